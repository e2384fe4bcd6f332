"""A local stand-in of the part of the hub's HTTP API that a download needs: what a repository holds, and its files."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

COMMIT = "89abcdef0123456789abcdef0123456789abcdef"


class HubFiles:
    """Serves folders on a free port of loopback.

    Args:
        repositories: Folder of each, by ``datasets/OWNER/NAME`` or ``models/OWNER/NAME``.
        gated: Those that answer 403 without the token ``hf_right``.
    """

    def __init__(self, repositories, gated=()):
        self.repositories, self.gated, self.asked = repositories, gated, []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_HEAD(self):
                hub.answer(self)

            def do_GET(self):
                hub.answer(self)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self._server.server_port}"

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request):
        path = unquote(request.path.partition("?")[0]).strip("/")
        self.asked.append(f"{request.command} {path}")
        code, content, headers = self._found(path, request.headers.get("Authorization"))
        request.send_response(code)
        for name, value in {"Content-Length": len(content), **headers}.items():
            request.send_header(name, str(value))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(content)

    def _found(self, path, authorization):
        for name, folder in self.repositories.items():
            files = {each.relative_to(folder).as_posix(): each for each in sorted(folder.rglob("*")) if each.is_file()}
            own = (f"api/{name}/", f"{name}/", f"{name.partition('/')[2]}/")
            if not path.startswith(own) and path != f"api/{name}":
                continue
            if name in self.gated and authorization != "Bearer hf_right":
                return 403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to this resource is restricted"}
            if path.startswith(f"api/{name}/tree/"):
                listed = [
                    {"type": "file", "path": each, "size": place.stat().st_size, "oid": _etag(place)}
                    for each, place in files.items()
                ]
                return 200, json.dumps(listed).encode(), {"Content-Type": "application/json"}
            if path.startswith(f"api/{name}"):
                told = {"id": name.partition("/")[2], "sha": COMMIT, "siblings": [{"rfilename": each} for each in files]}
                return 200, json.dumps(told).encode(), {"Content-Type": "application/json"}
            wanted = path.partition("/resolve/")[2].partition("/")[2]
            if wanted in files:
                return 200, files[wanted].read_bytes(), {"ETag": f'"{_etag(files[wanted])}"', "X-Repo-Commit": COMMIT}
            return 404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}
        return 404, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}


def _etag(path):
    return hashlib.sha1(path.read_bytes()).hexdigest()
