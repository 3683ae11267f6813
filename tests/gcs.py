"""As much of Cloud Storage as its clients need here, in memory, over HTTP.

Objects have generations, which a request may name as a condition, since
TensorStore relies on them; nobody is asked who they are.
"""

import contextlib
import http.server
import json
import re
import sys
import threading
import urllib.parse
from collections.abc import Iterator

#: How clients are told where the server is.
ADDRESSES = ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL")
#: How they are kept from asking elsewhere who they are, and what a bucket is.
OTHERS = {
  "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
  "NO_GCE_CHECK": "true",
  "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
}


@contextlib.contextmanager
def serving() -> Iterator[tuple[dict[str, str], dict]]:
  """Yields the environment of clients, and the objects.

  They are {(bucket, name): (generation, content)}.
  """
  server = Server(("127.0.0.1", 0), Handler)
  server.objects, server.lock, server.last = {}, threading.Lock(), 0
  server.uploads = {}
  thread = threading.Thread(target=server.serve_forever, daemon=True)
  thread.start()
  url = f"http://127.0.0.1:{server.server_port}"
  try:
    yield dict.fromkeys(ADDRESSES, url) | OTHERS, server.objects
  finally:
    server.shutdown()
    server.server_close()
    thread.join()


class Server(http.server.ThreadingHTTPServer):
  """A server whose clients may hang up."""

  def handle_error(self, request, client_address):
    if not isinstance(sys.exception(), ConnectionError):
      super().handle_error(request, client_address)


class Handler(http.server.BaseHTTPRequestHandler):
  """Answers requests of the JSON API."""

  protocol_version = "HTTP/1.1"
  # An answer is one packet, which does not wait for the last one to arrive.
  wbufsize = -1
  disable_nagle_algorithm = True

  def log_message(self, *_):
    pass

  def do_GET(self):
    self.handle_one()

  do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815

  def handle_one(self):
    body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
    with self.server.lock:
      status, headers, content = self.answer(self.command, self.path, body)
    self.send_response(status)
    for name, value in headers.items():
      self.send_header(name, value)
    self.send_header("Content-Length", str(len(content)))
    self.end_headers()
    self.wfile.write(content)

  def answer(self, verb, url, body):
    """Returns status, headers and content."""
    parts = urllib.parse.urlsplit(url)
    query = dict(urllib.parse.parse_qsl(parts.query, keep_blank_values=True))
    path = parts.path
    if path.startswith("/batch/"):
      return self.batch(body)
    found = re.fullmatch(
      r"(?:/(upload|download))?/storage/v1/b/([^/]+)(?:/o(?:/([^/]+)(?:"
      r"/(?:rewriteTo|copyTo)/b/([^/]+)/o/([^/]+))?)?)?",
      path,
    )
    if not found:
      return 404, {}, b"{}"
    kind, bucket, *rest = found.groups()
    name, other, target = (
      part if part is None else urllib.parse.unquote(part) for part in rest
    )
    if target is not None:
      source = self.server.objects.get((bucket, name))
      if source is None:
        return 404, {}, b"{}"
      resource = self.put(other, target, source[1])
      done = {"done": True, "resource": resource}
      return as_json(done if "rewriteTo" in path else resource)
    if kind == "upload":
      return self.upload(verb, bucket, query, body)
    if name is None:
      if "/o" not in path:
        return as_json({"name": bucket, "kind": "storage#bucket"})
      return self.listed(bucket, query)
    return self.one(verb, bucket, name, query)

  def one(self, verb, bucket, name, query):
    """Reads or deletes an object."""
    generation, content = self.server.objects.get((bucket, name), (0, None))
    if query.get("ifGenerationMatch", str(generation)) != str(generation):
      return 412, {}, b"{}"
    if query.get("ifGenerationNotMatch") == str(generation):
      return 304, {}, b""
    if content is None:
      return 404, {}, b"{}"
    if verb == "DELETE":
      del self.server.objects[bucket, name]
      return 204, {}, b""
    if query.get("alt") != "media":
      return as_json(describe(bucket, name, generation, content))
    headers = {"x-goog-generation": str(generation)}
    given = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
    if not given:
      return 200, headers, content
    first, last = int(given[1]), int(given[2] or len(content) - 1)
    if first >= len(content):
      return 416, headers, b""
    part = content[first : last + 1]
    last = first + len(part) - 1
    headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
    return 206, headers, part

  def upload(self, verb, bucket, query, body):
    """Writes an object: at once, with its description, or in parts."""
    name = query.get("name")
    if "upload_id" in query:
      bucket, name, before = self.server.uploads[query["upload_id"]]
      body = before + body
      _, _, size = self.headers["Content-Range"].rpartition("/")
      if size == "*" or len(body) < int(size):
        self.server.uploads[query["upload_id"]] = bucket, name, body
        return 308, {"Range": f"bytes=0-{len(body) - 1}"}, b""
    elif query["uploadType"] == "resumable":
      name = name or json.loads(body)["name"]
      key = str(len(self.server.uploads))
      self.server.uploads[key] = bucket, name, b""
      host = self.headers["Host"]
      path = f"/upload/storage/v1/b/{bucket}/o"
      where = f"http://{host}{path}?uploadType=resumable&upload_id={key}"
      return 200, {"Location": where}, b"{}"
    elif query["uploadType"] == "multipart":
      edge = self.headers["Content-Type"].partition("boundary=")[2].strip("\"'")
      _, head, rest = body.split(b"--" + edge.encode(), 2)
      name = json.loads(after_blank_line(head))["name"]
      # The content may have the edge in it, but ends before the last.
      body = after_blank_line(rest.rpartition(b"--" + edge.encode())[0])
      body = body.removesuffix(b"\n").removesuffix(b"\r")
    generation, _ = self.server.objects.get((bucket, name), (0, None))
    if query.get("ifGenerationMatch", str(generation)) != str(generation):
      return 412, {}, b"{}"
    return as_json(self.put(bucket, name, body))

  def put(self, bucket, name, content):
    """Stores an object and returns its description."""
    self.server.last += 1
    self.server.objects[bucket, name] = self.server.last, content
    return describe(bucket, name, self.server.last, content)

  def listed(self, bucket, query):
    """Lists objects, and what their names have in common."""
    prefix, edge = query.get("prefix", ""), query.get("delimiter")
    items, prefixes = [], set()
    for (place, name), (generation, content) in sorted(
      self.server.objects.items()
    ):
      if place != bucket or not name.startswith(prefix):
        continue
      if edge and edge in name[len(prefix) :]:
        head = name[len(prefix) :].split(edge)[0]
        prefixes.add(prefix + head + edge)
      else:
        items.append(describe(bucket, name, generation, content))
    return as_json({"items": items, "prefixes": sorted(prefixes)})

  def batch(self, body):
    """Answers several requests that come in one."""
    answers = []
    for verb, path in re.findall(rb"(?m)^(DELETE|GET) (\S+) HTTP", body):
      status, _, content = self.answer(verb.decode(), path.decode(), b"")
      answers.append(
        b"--edge\r\nContent-Type: application/http\r\n\r\n"
        + f"HTTP/1.1 {status} OK\r\n\r\n".encode()
        + content
        + b"\r\n"
      )
    content = b"".join(answers) + b"--edge--"
    return 200, {"Content-Type": "multipart/mixed; boundary=edge"}, content


def after_blank_line(part):
  """Returns the body of a part, whose lines end in one way or the other."""
  return re.split(b"\r?\n\r?\n", part, maxsplit=1)[1]


def describe(bucket, name, generation, content):
  """Returns what the API says of an object."""
  return {
    "kind": "storage#object",
    "id": f"{bucket}/{name}/{generation}",
    "bucket": bucket,
    "name": name,
    "size": str(len(content)),
    "generation": str(generation),
    "metageneration": "1",
    "storageClass": "STANDARD",
    "timeCreated": "2024-01-01T00:00:00.000Z",
    "updated": "2024-01-01T00:00:00.000Z",
  }


def as_json(value):
  """Returns an answer."""
  headers = {"Content-Type": "application/json"}
  return 200, headers, json.dumps(value).encode()
