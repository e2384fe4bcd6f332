"""A local stand-in of the part of the hub's HTTP API that a download needs: what a repository holds, and its files."""

import hashlib
import json
from urllib.parse import unquote

from loopback import LoopbackServer

COMMIT = "89abcdef0123456789abcdef0123456789abcdef"


class HubFiles:
    """Serves folders on a free port of loopback.

    Args:
        repositories: Folder of each, by ``datasets/OWNER/NAME`` or ``models/OWNER/NAME``.
        gated: Those that answer 403 without the token ``hf_right``.
    """

    def __init__(self, repositories, gated=()):
        self.repositories, self.gated, self.asked = repositories, gated, []
        self._server = LoopbackServer(self._answer)

    @property
    def url(self):
        return self._server.url

    def close(self):
        self._server.close()

    def _answer(self, verb, path, headers, _):
        path = unquote(path).strip("/")
        self.asked.append(f"{verb} {path}")
        code, content, own = self._found(path, headers.get("Authorization"))
        return code, own, content

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
