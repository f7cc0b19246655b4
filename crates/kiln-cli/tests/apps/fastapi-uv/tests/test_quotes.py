from fastapi.testclient import TestClient

from quotes.main import app


def test_quotes():
    assert TestClient(app).get("/quotes/1").json()["author"] == "A. Korzybski"
