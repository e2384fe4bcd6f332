"""A local stand-in of the part of the hub's HTTP API that a push needs: repositories, validation of cards, commits."""

import base64
import json

import yaml
from loopback import LoopbackServer

SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Serves on a free port of loopback; `repositories` is what was pushed: visibility, and content by file."""

    def __init__(self, token="hf_right"):
        self.token, self.repositories, self.asked, self.refuses = token, {}, [], None
        self._server = LoopbackServer(self._answer)

    @property
    def url(self):
        return self._server.url

    def close(self):
        self._server.close()

    def _answer(self, verb, path, headers, body):
        self.asked.append((verb, path))
        code, content = self._found(verb, path, body, headers.get("Authorization"))
        error = {"X-Error-Message": content["error"]} if code >= 400 else {}
        return code, {"Content-Type": "application/json", **error}, json.dumps(content).encode()

    def _found(self, verb, path, body, authorization):
        if authorization != f"Bearer {self.token}":
            return 401, {"error": "Invalid credentials in Authorization header"}
        if self.refuses is not None and path.startswith(self.refuses):
            return 403, {"error": "You have read access but not the required permissions for this operation"}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name in self.repositories:
                return 409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"}
            self.repositories[name] = {"visibility": asked["visibility"], "files": {}}
            return 200, {"url": f"{self.url}/{name}", "id": name}
        if path == "/api/validate-yaml":
            content = json.loads(body)["content"]
            data = yaml.safe_load(content.split("---\n")[1])
            assert all(part["dataset"]["type"] for index in data.get("model-index", []) for part in index["results"])
            return 200, {"errors": [], "warnings": []}
        for name, repository in self.repositories.items():
            if path in (f"/api/models/{name}", f"/api/models/{name}/revision/main"):
                return 200, {"id": name, "private": repository["visibility"] == "private", "sha": SHA, "siblings": []}
            if path == f"/api/models/{name}/preupload/main":
                files = [
                    {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False} for each in json.loads(body)["files"]
                ]
                return 200, {"files": files}
            if path == f"/api/models/{name}/commit/main":
                for line in body.decode().splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        repository["files"][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                return 200, {"success": True, "commitOid": SHA, "commitUrl": f"{self.url}/{name}/commit/{SHA}"}
        return 404, {"error": f"Repository not found: {verb} {path}"}
