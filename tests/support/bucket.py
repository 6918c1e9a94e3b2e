"""An S3 server on the loopback interface: moto's, which answers as Amazon's does."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dcdit.data import stores


class Bucket(logging.Handler):
    """A bucket called ``bucket``.

    Attributes:
        client: boto3's, which dcdit does not use.
        asked: the method and path of each request.
    """

    def __init__(self) -> None:
        super().__init__()
        self.client: Any = None
        self.asked: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep what werkzeug logs of a request."""
        if found := re.search(r"([A-Z]+) (/\S*) HTTP", record.getMessage()):
            self.asked.append((found[1], found[2]))

    def put(self, folder: Path, prefix: str) -> None:
        """Copy a folder into the bucket."""
        for path in folder.rglob("*"):
            if path.is_file():
                self.client.upload_file(str(path), "bucket", f"{prefix}/{path.relative_to(folder).as_posix()}")


@contextmanager
def bucket_served() -> Iterator[Bucket]:
    """A server of one bucket, to which the environment of this process leads."""
    boto3 = pytest.importorskip("boto3")
    server_of = pytest.importorskip("moto.server").ThreadedMotoServer
    log, bucket = logging.getLogger("werkzeug"), Bucket()
    log.handlers, log.propagate = [bucket], False
    server = server_of(ip_address="127.0.0.1", port=0, verbose=True)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "key-of-a-test",
            "AWS_SECRET_ACCESS_KEY": "secret-of-a-test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "no_proxy": "*",
        }.items():
            patch.setenv(name, value)
        stores._filesystem.cache_clear()
        bucket.client = boto3.client("s3")
        bucket.client.create_bucket(Bucket="bucket")
        yield bucket
    stores._filesystem.cache_clear()
    server.stop()
