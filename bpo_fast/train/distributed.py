"""The end of a training in several processes."""

import gc

from transformers import Trainer


def end_processes(trainer: Trainer) -> None:
    """End the group of a training's processes while the interpreter still runs; every process of it must call this.

    DistributedDataParallel holds the group, whose threads hold tensors of the last exchange. As long as they run,
    `destroy_process_group` ends nothing, and a thread that lets go of a tensor after the interpreter ended aborts the
    process (pytorch#179291). The trainer cannot train on afterwards; its model can be saved.

    Args:
        trainer: in one process among several, or alone, where there is nothing to end.
    """
    if trainer.args.world_size == 1:
        return
    trainer.accelerator.wait_for_everyone()
    trainer.model_wrapped = trainer.model
    trainer.accelerator.free_memory()
    gc.collect()
    trainer.accelerator.end_training()
