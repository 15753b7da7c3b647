"""The part of the virtual event loop that refuses input and output."""

from __future__ import annotations

import asyncio
from typing import Any, NoReturn

from forebay.simulation.loop.simulation_errors import RealIO


def _forbidden(what: str) -> Any:
    def forbid(_self: asyncio.AbstractEventLoop, /, *_args: Any, **_kwargs: Any) -> NoReturn:
        raise RealIO(what=what)

    forbid.__name__ = what
    return forbid


class NoIOLoop(asyncio.BaseEventLoop):
    """An event loop of callbacks and timers; sockets, pipes, subprocesses and signals raise `RealIO`."""

    add_reader = _forbidden("add_reader")
    remove_reader = _forbidden("remove_reader")
    add_writer = _forbidden("add_writer")
    remove_writer = _forbidden("remove_writer")
    add_signal_handler = _forbidden("add_signal_handler")
    remove_signal_handler = _forbidden("remove_signal_handler")
    connect_accepted_socket = _forbidden("connect_accepted_socket")
    connect_read_pipe = _forbidden("connect_read_pipe")
    connect_write_pipe = _forbidden("connect_write_pipe")
    create_connection = _forbidden("create_connection")
    create_datagram_endpoint = _forbidden("create_datagram_endpoint")
    create_server = _forbidden("create_server")
    create_unix_connection = _forbidden("create_unix_connection")
    create_unix_server = _forbidden("create_unix_server")
    getaddrinfo = _forbidden("getaddrinfo")
    getnameinfo = _forbidden("getnameinfo")
    sendfile = _forbidden("sendfile")
    sock_accept = _forbidden("sock_accept")
    sock_connect = _forbidden("sock_connect")
    sock_recv = _forbidden("sock_recv")
    sock_recv_into = _forbidden("sock_recv_into")
    sock_recvfrom = _forbidden("sock_recvfrom")
    sock_recvfrom_into = _forbidden("sock_recvfrom_into")
    sock_sendall = _forbidden("sock_sendall")
    sock_sendfile = _forbidden("sock_sendfile")
    sock_sendto = _forbidden("sock_sendto")
    start_tls = _forbidden("start_tls")
    subprocess_exec = _forbidden("subprocess_exec")
    subprocess_shell = _forbidden("subprocess_shell")
