"""A page from Flask, built by kiln without a Dockerfile."""

from flask import Flask

VERSION = "1"

app = Flask(__name__)


@app.get("/")
def index():
    return f"Hello from Flask, version {VERSION}\n", {"Content-Type": "text/plain; charset=utf-8"}
