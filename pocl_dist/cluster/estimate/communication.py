"""How long collectives take: a ring over all ranks, or first between and then within the nodes.

The usual cost model (Thakur, Rabenseifner and Gropp, 2005): a message costs a latency and its bytes
over the bandwidth. `num_bytes` is the whole tensor, of which every rank has or gets a part.
"""

from __future__ import annotations

from dataclasses import dataclass

from pocl_dist.cluster.estimate.devices import Link


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal size."""

    num_nodes: int
    devices_per_node: int
    intra: Link
    inter: Link

    @property
    def world_size(self) -> int:
        """Returns the ranks."""
        return self.num_nodes * self.devices_per_node


def ring_seconds(num_bytes: float, num_ranks: int, link: Link) -> float:
    """Returns (n - 1) * (latency + bytes / n / bandwidth): each rank passes on n - 1 parts."""
    part = num_bytes / num_ranks
    return (num_ranks - 1) * (link.latency_seconds + part / link.bytes_per_second)


def flat_ring_seconds(num_bytes: float, cluster: Cluster) -> float:
    """Returns the time of one ring through all ranks.

    Every device has a network port of its own and each begins a ring, so that a node's ports
    together carry what crosses; the slower of that and of the links within is what counts.
    """
    nodes, size = cluster.num_nodes, cluster.devices_per_node
    if nodes == 1:
        return ring_seconds(num_bytes, size, cluster.intra)
    ranks = cluster.world_size
    bandwidth = size * cluster.inter.bytes_per_second
    if size > 1:
        bandwidth = min(bandwidth, cluster.intra.bytes_per_second)
    steps_inter = (ranks - 1) * nodes / ranks
    latency = steps_inter * cluster.inter.latency_seconds
    latency += (ranks - 1 - steps_inter) * cluster.intra.latency_seconds
    return latency + (ranks - 1) / ranks * num_bytes / bandwidth


def hierarchical_seconds(num_bytes: float, cluster: Cluster) -> float:
    """Returns the time of rings between the nodes, one per device of a node, then within them."""
    size = cluster.devices_per_node
    between = ring_seconds(num_bytes / size, cluster.num_nodes, cluster.inter)
    return between + ring_seconds(num_bytes, size, cluster.intra)


def all_gather_seconds(num_bytes: float, cluster: Cluster, num_messages: float = 1) -> float:
    """Returns the time to gather `num_bytes` in `num_messages` calls, by the faster algorithm."""
    if cluster.world_size == 1 or num_bytes == 0:
        return 0.0
    each = num_bytes / num_messages
    return num_messages * min(flat_ring_seconds(each, cluster), hierarchical_seconds(each, cluster))


def reduce_scatter_seconds(num_bytes: float, cluster: Cluster, num_messages: float = 1) -> float:
    """Returns the time to reduce and scatter: an all-gather backwards (additions cost nothing)."""
    return all_gather_seconds(num_bytes, cluster, num_messages)


def all_reduce_seconds(num_bytes: float, cluster: Cluster, num_messages: float = 1) -> float:
    """Returns the time of an all-reduce: a reduce-scatter, then an all-gather."""
    return 2 * all_gather_seconds(num_bytes, cluster, num_messages)
