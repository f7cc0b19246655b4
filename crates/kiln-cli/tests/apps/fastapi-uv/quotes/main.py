import os
import sys

from fastapi import FastAPI, HTTPException
from pydantic import BaseModel

app = FastAPI(title="Quotes")


class Quote(BaseModel):
    text: str
    author: str


QUOTES = [
    Quote(text="Make it as simple as possible, but not simpler.", author="attributed"),
    Quote(text="The map is not the territory.", author="A. Korzybski"),
]


@app.get("/quotes/{number}")
def quote(number: int) -> Quote:
    if not 0 <= number < len(QUOTES):
        raise HTTPException(404, "no such quote")
    return QUOTES[number]


@app.get("/")
def about() -> dict:
    native = [name for name, module in sys.modules.items() if str(getattr(module, "__file__", "")).endswith(".so")]
    return {"user": os.getuid(), "native": sorted(name for name in native if name.startswith("pydantic_core"))}
