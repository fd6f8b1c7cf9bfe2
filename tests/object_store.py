"""A real S3 protocol on loopback; tests that import this are skipped where its server is not installed."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import quote
from uuid import uuid4

import pytest

boto3 = pytest.importorskip("boto3")
ThreadedMotoServer = pytest.importorskip("moto.server").ThreadedMotoServer


@contextmanager
def served_bucket() -> Iterator[str]:
    """Address of an empty bucket, its query in place. The servers of one process share what they hold, so it has a new name."""
    bucket = f"runs-{uuid4().hex[:8]}"
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # else every request is a line on the screen
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"aws_access_key_id": "k", "aws_secret_access_key": "s", "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=f"http://{host}:{port}", **keys).create_bucket(Bucket=bucket)
    try:
        yield f"s3://k:s@{bucket}/a?endpoint_override={quote(f'{host}:{port}', safe='')}&scheme=http&region=us-east-1"
    finally:
        server.stop()
