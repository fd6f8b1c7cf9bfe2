"""Training talks to nobody but its own ranks: the addresses of a run's sockets, as the system saw them."""

import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.test_train import ENVIRONMENT, ROOT

ADDRESS = re.compile(
    r"(?P<call>connect|bind|sendto|sendmsg|sendmmsg)\(.*?sa_family=(?P<family>\w+)"
    r"(?:.*?inet_(?:addr|pton)\((?:AF_INET6, )?\"(?P<host>[^\"]+)\")?"
)
LOOPBACK = re.compile(r"127\.[\d.]+|::1|::ffff:127\.[\d.]+")
NAME_QUERY = r"\1\0\0\1\0\0\0\0\0\0"
"""As strace writes the head of a question to a name server (RFC 1035, section 4.1.1)."""
EVERYWHERE = ("0.0.0.0", "::")


def addresses(trace: str) -> set[tuple[str, str]]:
    """(call, address) of every call with an address of the internet."""
    found = set()
    for line in trace.splitlines():
        match = ADDRESS.search(line)
        if match and match["family"] in ("AF_INET", "AF_INET6"):
            found.add((match["call"], match["host"] or "?"))
    return found


def traced(directory: Path, *program: str) -> set[tuple[str, str]]:
    """The addresses that a program and all its processes use."""
    trace = directory / "trace"
    calls = "connect,bind,sendto,sendmsg,sendmmsg"
    command = ["strace", "-f", "-qq", "-s", "200", "-e", f"trace={calls}", "-o", str(trace), *program]
    done = subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return addresses(trace.read_text())


def name_servers() -> set[str]:
    """Whom this computer asks for names."""
    return set(re.findall(r"^nameserver\s+(\S+)", Path("/etc/resolv.conf").read_text(), re.MULTILINE))


needs_strace = pytest.mark.skipif(
    shutil.which("strace") is None
    or subprocess.run(["strace", "-qq", "-o", "/dev/null", "true"], capture_output=True, check=False).returncode != 0,
    reason="no strace, or it may not trace here",
)


@needs_strace
def test_what_is_sent_abroad_is_seen(tmp_path: Path):
    """Planted: addresses that are kept for documentation (RFC 5737, RFC 3849), so that nobody is called."""
    program = (
        "import socket, contextlib\n"
        "for family, kind, host in ((2, 1, '192.0.2.1'), (2, 2, '192.0.2.2'), (10, 1, '2001:db8::1')):\n"
        "    with contextlib.suppress(OSError), socket.socket(family, kind) as one:\n"
        "        one.setblocking(False)\n"
        "        one.sendto(b'x', (host, 9)) if kind == 2 else one.connect((host, 9))\n"
    )
    assert traced(tmp_path, sys.executable, "-c", program) == {
        ("connect", "192.0.2.1"),
        ("sendto", "192.0.2.2"),
        ("connect", "2001:db8::1"),
    }


@pytest.mark.slow
@needs_strace
def test_one_rank_uses_no_network(configuration: str, tmp_path: Path):
    arguments = ["train", configuration, "train.steps=2", "log.tensorboard=true", "checkpoint.every_steps=1"]
    found = traced(tmp_path, sys.executable, "-m", "launch", *arguments)
    assert (tmp_path / "run/checkpoints/step-00000002").is_dir()
    assert not {(call, host) for call, host in found if call != "bind"}, "it connects to nothing"
    assert all(LOOPBACK.fullmatch(host) for _, host in found), "and nobody can connect to it"


@pytest.mark.slow
@needs_strace
def test_two_ranks_use_none_but_this_computers(configuration: str, tmp_path: Path):
    arguments = ["train", configuration, "--nproc", "2", "train.steps=2"]
    found = traced(tmp_path, sys.executable, "-m", "launch", *arguments)
    assert (tmp_path / "run/checkpoints/step-00000002").is_dir()
    own = set(subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=True).stdout.split())
    connected = {host for call, host in found if call != "bind"}
    assert connected, "ranks meet somewhere"
    assert not {host for host in connected if not LOOPBACK.fullmatch(host)} - own - name_servers()
    asked = [line for line in (tmp_path / "trace").read_text().splitlines() if NAME_QUERY in line]
    strange = [line for line in asked if r"127\7in-addr" not in line and socket.gethostname() not in line]
    assert not strange, "torch's store asks what 127.0.0.1 is called, and nobody asks for anything else"
    assert not {host for call, host in found if call == "bind" and not LOOPBACK.fullmatch(host)} - own - set(EVERYWHERE)
