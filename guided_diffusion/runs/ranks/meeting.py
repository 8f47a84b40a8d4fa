"""The store in which the ranks of a job meet: rank 0 keeps it, the others look for it."""

import contextlib
import socket
import struct
import sys
import time
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from ...settings.options import BadInput

CONNECT_S = 5
"""Seconds for one try to reach the store at one address."""

START_S = 300
"""Seconds for rank 0 to come, where a scheduler starts the ranks one by one."""

GROUP_TIMEOUT = timedelta(minutes=30)
"""How long ranks of a process group wait for one that does not come, such as rank 0 that saves and samples."""

SIOCGIFADDR = 0x8915
"""Linux's request for an interface's address."""


def keep_store(port: int) -> dist.TCPStore:
    """The store of rank 0, for all its machine's addresses; torch.distributed may share it within this process."""
    return dist.TCPStore(
        "127.0.0.1", port, is_master=True, timeout=GROUP_TIMEOUT, wait_for_workers=False, multi_tenant=port != 0
    )


def find_store(hosts: Sequence[str], port: int, wait_s: float, token: str = "") -> tuple[dist.TCPStore, str]:
    """Rank 0's store and where it is: at the first of these hosts that has it, with its `token` if there is one.

    `BadInput` names them if none has it within `wait_s` seconds.
    """
    began, said, problem = time.monotonic(), False, ""
    while True:
        for host in hosts:
            try:
                socket.create_connection((host, port), CONNECT_S).close()
                store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=CONNECT_S))
                if not token or (store.check(["token"]) and store.get("token").decode() == token):
                    store.set_timeout(GROUP_TIMEOUT)
                    return store, f"{host}:{port}"
                problem = "another job answers"
            except (OSError, RuntimeError) as error:
                problem = str(error).partition("\n")[0]
        where = " or ".join(f"{host}:{port}" for host in hosts)
        if time.monotonic() - began >= wait_s:
            raise BadInput(f"rank 0, which keeps what ranks share, cannot be reached at {where} ({problem})")
        if not said and time.monotonic() - began >= 2 * CONNECT_S:
            sys.stderr.write(f"waiting for rank 0 at {where} ({problem})\n")
            said = True
        time.sleep(1)


def addresses() -> list[str]:
    """Where other machines may reach this one: the addresses of its interfaces, and at last its name."""
    found = []
    with contextlib.suppress(ImportError):
        import fcntl  # not on Windows

        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
                answer = fcntl.ioctl(asking, SIOCGIFADDR, struct.pack("256s", name.encode()))
                found.append(socket.inet_ntoa(answer[20:24]))
    return [*(address for address in found if not address.startswith("127.")), socket.gethostname()]
