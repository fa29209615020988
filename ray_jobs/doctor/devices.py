"""What the GPUs of this machine can do, tried on each of them."""

from ray_jobs.doctor.finding import Finding


def check_gpu() -> Finding:
    """Torch computes on every CUDA device, in bfloat16 too."""
    import torch

    name = "gpu"
    if not torch.cuda.is_available():
        return Finding(
            name=name,
            ok=False,
            what="torch sees no CUDA device",
            mend="small models train on the CPU; for ViT-B use a machine with a GPU and a driver for "
            f"CUDA {torch.version.cuda}",
            needed=False,
        )
    found = []
    for index in range(torch.cuda.device_count()):
        with torch.cuda.device(index):
            ones = torch.ones(64, 64, device="cuda", dtype=torch.bfloat16)
            if float((ones @ ones).sum()) != 64**3:
                mend = "the device gives wrong sums: check its driver and its memory (nvidia-smi -q)"
                return Finding(name=name, ok=False, what=f"device {index} multiplies wrongly", mend=mend)
            free, total = torch.cuda.mem_get_info()
            found.append(f"{torch.cuda.get_device_name()}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free")
    return Finding(name=name, ok=True, what="; ".join(found))
