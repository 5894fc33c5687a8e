"""The processes of one run: which of them this is, and what the first decides for all."""

from __future__ import annotations

import atexit
import json
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch.distributed

from lorica.config import ConfigError

if TYPE_CHECKING:
    from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

TORCHRUN, SRUN = "TORCHELASTIC_RUN_ID", "SLURM_NTASKS"  # variables that tell of them


def from_outside() -> SLURMEnvironment | TorchElasticEnvironment | None:
    """Who started the processes: torchrun or srun; None: this program does, through Lightning, which takes seconds to be imported."""
    if TORCHRUN not in os.environ and SRUN not in os.environ:
        return None
    from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    return SLURMEnvironment() if SLURMEnvironment.detect() else None


def rank() -> int:
    """This process's number among all of the run, before and after they are connected."""
    given = from_outside()  # Lightning knows ranks only once its Trainer is built
    return int(os.environ.get("LOCAL_RANK", "0")) if given is None else given.global_rank()


def local_rank() -> int:
    """This process's number on its machine."""
    given = from_outside()
    return int(os.environ.get("LOCAL_RANK", "0")) if given is None else given.local_rank()


def check_world(devices: int, num_nodes: int) -> None:
    """Refuse a number of processes that differs from what the configuration says.

    Raises:
        ConfigError: torchrun or srun started more or fewer than trainer.devices x trainer.num_nodes; several machines without them.
    """
    given = from_outside()
    if given is None:
        if num_nodes > 1:
            raise ConfigError("trainer.num_nodes", num_nodes, "several machines are started by torchrun or srun, one process a device")
        return
    started = given.world_size()
    if started != devices * num_nodes:
        raise ConfigError(
            "trainer.devices",
            devices,
            f"{started} processes were started from outside; trainer.devices x trainer.num_nodes is {devices * num_nodes}",
            f"trainer.devices={started // num_nodes or 1}",
        )


def decided_once(decide: Callable[[], Any], accelerator: str, variable: str) -> Any:
    """`decide()` of rank 0, on every rank; the ConfigError that it raises is raised on every rank.

    Where torchrun or srun started the processes they are connected here, and Lightning takes that connection over. Ranks that
    rank 0's Lightning starts later find the decision, which must be made of JSON, in their environment.

    Args:
        variable: the environment variable that hands it down.
    """
    given = from_outside()
    if given is None or given.world_size() == 1:
        if rank() == 0:
            os.environ[variable] = json.dumps(decide())
        return json.loads(os.environ[variable])
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            "nccl" if accelerator != "cpu" and torch.cuda.is_available() else "gloo",
            init_method="env://" if TORCHRUN in os.environ else f"tcp://{given.main_address}:{given.main_port}",
            rank=given.global_rank(),
            world_size=given.world_size(),
        )
        if torch.distributed.get_backend() == "nccl":
            torch.cuda.set_device(given.local_rank())
    decision: list[Any] = [None, None]
    if given.global_rank() == 0:
        try:
            decision = [decide(), None]
        except ConfigError as e:
            decision = [None, (e.where, e.value, e.rule, e.fix)]
    torch.distributed.broadcast_object_list(decision, src=0)
    if decision[1] is not None:
        raise ConfigError(*decision[1])
    return decision[0]


def wait_for_all() -> None:
    """Until every process that was started from outside is here too."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def leave(code: int) -> None:
    """End a process that is one of several at once, after what is to be done at its exit: with the interpreter torch's threads are taken
    down, too, which now and then ends in SIGABRT, and the whole run in a failure."""
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
