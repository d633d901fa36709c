"""A client of a paligemma_jax server in the standard library alone: copy it into your program.

    python docs/deploy/client.py http://127.0.0.1:8000 picture.png "caption en"

The key, if the server wants one, is read from PALIGEMMA_API_KEY.
"""

import base64
import json
import mimetypes
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any


class Client:
    """A server, by its address and perhaps a key."""

    def __init__(self, url: str, key: str = "", timeout_s: float = 120.0):
        self._url, self._key, self._timeout_s = url.rstrip("/"), key, timeout_s

    def ask(self, prompt: str, picture: str, **fields: Any) -> str:
        """The answer to a prompt about a picture's file; fields are those of chat completions: seed, max_tokens, ..."""
        with self._post("/v1/chat/completions", _chat(prompt, picture) | fields) as response:
            return json.load(response)["choices"][0]["message"]["content"]

    def stream(self, prompt: str, picture: str, **fields: Any) -> Iterator[str]:
        """The same, piece by piece."""
        with self._post("/v1/chat/completions", _chat(prompt, picture) | fields | {"stream": True}) as response:
            for line in response:
                text = line.decode().strip().removeprefix("data: ")
                if text in ("", "[DONE]") or text.startswith(":"):
                    continue
                event = json.loads(text)
                if "error" in event:
                    raise RuntimeError(event["error"]["message"])
                for choice in event["choices"]:
                    yield choice["delta"].get("content") or ""

    def caption(self, picture: str) -> str:
        """A sentence about a picture."""
        return self.ask("caption en", picture)

    def detect(self, picture: str, thing: str) -> list[dict[str, float]]:
        """Boxes of a thing, x_min, y_min, x_max and y_max in 0..1."""
        with self._post("/v1/detect", {"image_url": data_uri(picture), "object": thing}) as response:
            return json.load(response)["objects"]

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        headers = {"content-type": "application/json"}
        if self._key:
            headers["authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self._url + path, json.dumps(body).encode(), headers)
        try:
            return urllib.request.urlopen(request, timeout=self._timeout_s)
        except urllib.error.HTTPError as error:
            with error:
                content = error.read().decode("utf-8", "replace")
            try:
                message = json.loads(content)["error"]["message"]
            except (ValueError, KeyError, TypeError):  # from a proxy
                message = content[:200]
            raise RuntimeError(f"{error.code}: {message}") from None


def data_uri(picture: str) -> str:
    """A picture's file, as requests hold it."""
    kind = mimetypes.guess_type(picture)[0] or "application/octet-stream"
    with open(picture, "rb") as file:
        return f"data:{kind};base64,{base64.b64encode(file.read()).decode()}"


def _chat(prompt: str, picture: str) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": data_uri(picture)}}, {"type": "text", "text": prompt}]
    return {"messages": [{"role": "user", "content": parts}]}


if __name__ == "__main__":
    client = Client(sys.argv[1], os.environ.get("PALIGEMMA_API_KEY", ""))
    for piece in client.stream(sys.argv[3], sys.argv[2]):
        print(piece, end="", flush=True)
    print()
