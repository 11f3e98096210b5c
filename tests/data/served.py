"""A packed dataset behind a real server: an HTTP server that counts and can misbehave, or a local S3."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Served:
    """What an HTTP server was asked for, and how it shall misbehave.

    Attributes:
        gets: finished GETs by the path's last part.
        spoil: number of next answers whose bytes are damaged.
        slow: seconds between two pieces of 4 KiB.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.gets, self.spoil, self.slow = root, Counter[str](), 0, 0.0
        self.url = ""

    @property
    def shards(self) -> Counter[str]:
        """GETs of shards."""
        return Counter({name: count for name, count in self.gets.items() if name.endswith(".tar")})


@contextmanager
def http(root: Path) -> Iterator[Served]:
    """Serve a folder over HTTP on a free port."""
    served = Served(root)

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(root))

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

        def copyfile(self, source: Any, outputfile: Any) -> None:
            served.gets[Path(self.path).name] += 1
            data = bytearray(source.read())
            if served.spoil and self.path.endswith(".tar"):
                served.spoil -= 1
                data[len(data) // 2] ^= 1
            for start in range(0, len(data), 4096 if served.slow else len(data)):
                outputfile.write(data[start : start + 4096] if served.slow else data)
                time.sleep(served.slow)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    served.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def s3(root: Path, prefix: str = "data/set") -> Iterator[str]:
    """A local S3 server that holds a folder's files; yields the dataset's URL. The environment tells the way to it."""
    import boto3
    import pytest
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    with pytest.MonkeyPatch.context() as patch:
        for key, value in {
            "AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():  # fmt: skip
            patch.setenv(key, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        for path in root.rglob("*"):
            if path.is_file():
                client.put_object(Bucket="bucket", Key=f"{prefix}/{path.relative_to(root)}", Body=path.read_bytes())
        try:
            yield f"s3://bucket/{prefix}"
        finally:
            server.stop()
