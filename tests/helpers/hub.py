"""Serve a hub on loopback that answers the calls for a dataset repository: revision, tree, file."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit


def serve(
    repository: str, commits: dict[str, dict[str, bytes]], branches: dict[str, str]
) -> tuple[ThreadingHTTPServer, list[str]]:
    """Start a hub that answers as the real one does.

    Args:
        commits: commit -> path -> content.
        branches: name -> commit; may change while the hub runs.

    Returns:
        The server, and the paths of the requests so far.
    """
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            path = unquote(urlsplit(self.path).path)
            asked.append(path)
            if match := re.fullmatch(rf"/api/datasets/{repository}/revision/(.+)", path):
                if commit := self._commit(match[1]):
                    self._json({"id": repository, "sha": commit, "private": False, "siblings": []})
            elif match := re.fullmatch(rf"/api/datasets/{repository}", path):
                self._json(
                    {"id": repository, "sha": branches["main"], "private": False, "siblings": []}
                )
            elif match := re.fullmatch(rf"/api/datasets/{repository}/tree/([^/]+)/?(.*)", path):
                if commit := self._commit(match[1]):
                    self._tree(commits[commit], match[2])
            elif match := re.fullmatch(rf"/datasets/{repository}/resolve/([^/]+)/(.+)", path):
                if commit := self._commit(match[1]):
                    self._file(commits[commit].get(match[2]), commit)
            else:
                self._json({"error": "not found"}, 404)

        do_HEAD = do_GET

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            match = re.fullmatch(
                rf"/api/datasets/{repository}/paths-info/(.+)", unquote(urlsplit(self.path).path)
            )
            paths = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
            self._json(
                [
                    entry
                    for path in paths
                    for entry in self._entries(commits[match[1]])
                    if entry["path"] == path
                ]
            )

        def _commit(self, revision: str) -> str | None:
            commit = revision if revision in commits else branches.get(revision)
            if commit is None:
                self.send_response(404)
                self.send_header("X-Error-Code", "RevisionNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
            return commit

        def _tree(self, files: dict[str, bytes], folder: str):
            deep = "recursive=true" in self.path.lower()
            parts = len(PurePosixPath(folder).parts)
            inside = [
                entry
                for entry in self._entries(files)
                if entry["path"].startswith(f"{folder}/" if folder else "")
            ]
            self._json(
                [
                    entry
                    for entry in inside
                    if deep or len(PurePosixPath(entry["path"]).parts) == parts + 1
                ]
            )

        def _entries(self, files: dict[str, bytes]) -> list[dict]:
            folders = {str(parent) for path in files for parent in PurePosixPath(path).parents} - {
                "."
            }
            return [
                *({"type": "directory", "path": path, "oid": "0" * 40} for path in sorted(folders)),
                *(
                    {"type": "file", "path": path, "size": len(content), "oid": "0" * 40}
                    for path, content in files.items()
                ),
            ]

        def _file(self, content: bytes | None, commit: str):
            if content is None:
                self._json({"error": "no such file"}, 404)
                return
            first, last = 0, len(content) - 1
            if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                first, last = int(wanted[1]), min(int(wanted[2] or last), last)
            self.send_response(206 if wanted else 200)
            for name, value in (
                ("X-Repo-Commit", commit), ("ETag", '"etag"'),
                ("Content-Length", str(last - first + 1)), ("Accept-Ranges", "bytes"),
                ("Content-Range", f"bytes {first}-{last}/{len(content)}"),
            ):  # fmt: skip
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content[first : last + 1])

        def _json(self, value, code: int = 200):
            body = json.dumps(value).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, asked
