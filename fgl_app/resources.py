"""What simulated clients ask of this machine, and what it has."""

from __future__ import annotations

from fgl_app.errors import ConfigError


def machine_resources() -> tuple[int, int]:
    """Return the CPU cores and GPUs of this machine as Ray and PyTorch count them, within a container's limits."""
    import torch
    from ray._private.utils import get_num_cpus  # private, but what `ray.init` itself asks

    return int(get_num_cpus(override_docker_cpu_warning=True)), torch.cuda.device_count()


def check_client_resources(client_cpus: int, client_gpus: float, num_cpus: int, num_gpus: int) -> None:
    """Refuse clients of which not one could start, for which Flower's simulation would have no actor.

    Args:
        client_cpus: CPU cores per client.
        client_gpus: Share of a GPU per client, or a whole number of GPUs.
        num_cpus: Cores that there are.
        num_gpus: GPUs that there are.

    Raises:
        ConfigError: If a client asks for more than there is, or for more than one GPU and a part of another.
    """
    if client_cpus > num_cpus:
        raise ConfigError(
            f"`--client-cpus` is {client_cpus}, but this machine has {num_cpus}, so no client could start. Use at most "
            f"--client-cpus {max(1, num_cpus)}."
        )
    if client_gpus and not num_gpus:
        raise ConfigError(
            f"`--client-gpus` is {client_gpus:g}, but PyTorch finds no GPU on this machine. Use 0: clients then train "
            "on the CPU."
        )
    if not 0 <= client_gpus <= num_gpus:
        raise ConfigError(
            f"`--client-gpus` is {client_gpus:g}, but this machine has {num_gpus}, so no client could start. Use at "
            f"most --client-gpus {num_gpus}."
        )
    if client_gpus > 1 and client_gpus != int(client_gpus):
        raise ConfigError(
            f"`--client-gpus` is {client_gpus:g}, but a client can have a share of one GPU or a whole number of them. "
            f"Use --client-gpus {int(client_gpus)}."
        )
