"""A server on this machine that answers wandb as far as a run and a workspace need it."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ME = {
    "id": "VXNlcjox",
    "username": "me",
    "entity": "me",
    "name": "me",
    "email": "me@example.org",
    "flags": "{}",
    "teams": {"edges": []},
}


class Server(ThreadingHTTPServer):
    """Keeps what was asked of it.

    Attributes:
        saved: Variables of each mutation that saved a view, with its specification decoded.
        view: The view that is stored, or None.
        refuses: Whether views cannot be saved.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.saved: list[dict] = []
        self.view: dict | None = None
        self.refuses = False
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def leave(self) -> None:
        """Be gone, as a network that is lost."""
        self.shutdown()
        self.server_close()

    def answer(self, query: str, asked: dict) -> dict:
        """The data of one GraphQL operation."""
        if "upsertView" in query:
            return self.keep(asked)
        if "allViews" in query:
            nodes = [{"node": self.view}] if self.view else []
            return {"project": {"allViews": {"edges": nodes}}}
        if "upsertBucket" in query:
            return {"upsertBucket": {"bucket": _bucket(asked), "inserted": True}}
        if "createRunFiles" in query:
            return {"createRunFiles": {"runID": "x", "uploadHeaders": [], "files": []}}
        return {"viewer": ME, "model": None, "project": None, "entity": None}

    def keep(self, asked: dict) -> dict:
        """Store a view; a person then adds a section of their own to it."""
        stored = json.loads(asked["spec"])
        self.saved.append(asked | {"spec": json.loads(asked["spec"])})
        sections = stored["section"]["panelBankConfig"]["sections"]
        if all(section["name"] != "Mine" for section in sections):
            sections.append(sections[0] | {"name": "Mine", "panels": []})
        spec = json.dumps(stored | {"version": -1})
        self.view = {"id": "Vmlldw==", "displayName": asked["displayName"], "spec": spec}
        return {"upsertView": {"view": {"id": "Vmlldw==", "name": asked["name"]}}}


def _bucket(asked: dict) -> dict:
    entity = {"id": "RQ==", "name": "me"}
    project = {"id": "UA==", "name": asked.get("project"), "entity": entity}
    return {"id": "Unk=", "name": asked.get("name"), "config": "{}", "project": project}


class _Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """What a test tells the server to do from now on."""
        if self.path == "/forget":
            self.server.view = None
        if self.path == "/refuse":
            self.server.refuses = True
        self.reply({})
        if self.path == "/leave":
            threading.Thread(target=self.server.leave).start()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path != "/graphql":
            return self.reply({})
        asked = json.loads(body)
        if self.server.refuses and "upsertView" in asked["query"]:
            return self.reply({"data": None, "errors": [{"message": "not today"}]})
        return self.reply({"data": self.server.answer(asked["query"], asked.get("variables", {}))})

    def reply(self, content: dict) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
