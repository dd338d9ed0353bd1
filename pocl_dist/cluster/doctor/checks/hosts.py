"""Other hosts and ports: the hostfile, ssh to each host, the port of rank 0."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator

from pocl_dist.cluster.doctor.case import Case
from pocl_dist.cluster.doctor.finding import Finding, SkipError, ok
from pocl_dist.errors import UnavailableError
from pocl_dist.hosts import check_hosts, check_port_here, chosen_hosts


def hosts(case: Case) -> Iterator[Finding]:
    """Reads the hostfile and asks every host over ssh, as the run does before it starts ranks."""
    launch = case.config.launch
    if launch.hostfile is None and launch.ranks_with != "deepspeed":
        yield ok(f"no hostfile is needed (launch.ranks_with: {launch.ranks_with})")
        return
    chosen = chosen_hosts(launch)
    for host in chosen:
        try:
            socket.getaddrinfo(host.name, launch.ssh_port, proto=socket.IPPROTO_TCP)
        except socket.gaierror as problem:
            if launch.ssh_config is None:  # else it may be a name of that file
                raise UnavailableError(
                    f"host {host.name} ({launch.hostfile}): no address is known for it: "
                    f"{problem.strerror}"
                ) from problem
    check_hosts(chosen, launch, sys.executable)
    names = ", ".join(host.name for host in chosen[:6])
    more = f" and {len(chosen) - 6} more" if len(chosen) > 6 else ""
    yield ok(f"{len(chosen)} host(s) of {launch.hostfile} answer: {names}{more}")


def ports(case: Case) -> Iterator[Finding]:
    """Whether the port of rank 0 is free, where it is this machine's."""
    launch = case.config.launch
    given = os.environ.get("MASTER_PORT")
    is_rank = "RANK" in os.environ  # then rank 0 may hold it already
    if is_rank:
        yield ok("a launcher has started this process: the port is its affair")
    elif launch.ranks_with == "torchrun":
        check_port_here(launch.master_port)
        yield ok(f"port {launch.master_port} (launch.master_port) is free here")
    elif launch.ranks_with == "local" and given is not None and given.isdigit():
        check_port_here(int(given))
        yield ok(f"port {given} (MASTER_PORT) is free here")
    elif launch.ranks_with == "deepspeed":
        yield ok(f"port {launch.master_port} is asked for on the first host (`hosts`)")
    elif launch.ranks_with == "srun":
        raise SkipError("the port of rank 0 is one of the job's first node, not of this machine")
    else:
        yield ok("a free port is chosen when the ranks are started")
