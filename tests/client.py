"""What guided-diffusion's eight scripts do, by the names of its modules alone.

`python client.py FOLDER` does it on every rank that it is started on: FOLDER has pictures/, and network.pt,
classifier.pt and upsampler.pt of the flags below; a folder for each script is written beside them.
"""

import argparse
import os
import random
import sys

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from guided_diffusion import dist_util, logger
from guided_diffusion.fp16_util import MixedPrecisionTrainer
from guided_diffusion.image_datasets import load_data
from guided_diffusion.resample import create_named_schedule_sampler
from guided_diffusion.script_util import (
    NUM_CLASSES,
    add_dict_to_argparser,
    args_to_dict,
    classifier_and_diffusion_defaults,
    classifier_defaults,
    create_classifier,
    create_classifier_and_diffusion,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
    sr_create_model_and_diffusion,
    sr_model_and_diffusion_defaults,
)
from guided_diffusion.train_util import TrainLoop, log_loss_dict, parse_resume_step_from_filename

SIZE, SMALL_SIZE, BATCH = 64, 16, 2
NETWORK = "--num_channels 32 --num_res_blocks 1 --num_heads 2 --learn_sigma True --diffusion_steps 100"
MODEL = f"{NETWORK} --image_size {SIZE} --channel_mult 1,1 --attention_resolutions 32 --class_cond True"
CLASSIFIER = f"--image_size {SIZE} --classifier_width 64 --classifier_depth 1 --classifier_attention_resolutions 8"
UPSAMPLER = f"{NETWORK} --large_size {SIZE} --small_size {SMALL_SIZE} --attention_resolutions 8"


def flags(defaults, text):
    """The settings with these defaults that a command line gives."""
    parser = argparse.ArgumentParser()
    add_dict_to_argparser(parser, defaults)
    return args_to_dict(parser.parse_args(text.split()), defaults.keys())


def model_and_diffusion(more=""):
    return create_model_and_diffusion(**flags(model_and_diffusion_defaults(), f"{MODEL} {more}"))


def upsampler_and_diffusion(more=""):
    return sr_create_model_and_diffusion(**flags(sr_model_and_diffusion_defaults(), f"{UPSAMPLER} {more}"))


def classifier():
    return create_classifier(**flags(classifier_defaults(), CLASSIFIER))


def seed(number):
    """Seed this rank alone."""
    number = 1000 * number + dist.get_rank()
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002
    torch.manual_seed(number)


def loaded(network, path):
    network.load_state_dict(dist_util.load_state_dict(path, map_location="cpu"))
    return network.to(dist_util.dev()).eval()


def pictures(folder, **more):
    return load_data(data_dir=f"{folder}/pictures", batch_size=BATCH, image_size=SIZE, class_cond=True, **more)


def gathered(values):
    """The values of all ranks, one after the other."""
    found = [torch.zeros_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(found, values.contiguous())
    return torch.cat(found).cpu().numpy()


def save(name, *arrays):
    """Rank 0 writes arrays; all ranks wait for it."""
    if dist.get_rank() == 0:
        np.savez(os.path.join(logger.get_dir(), name), *arrays)
    dist.barrier()


def pixels(sample):
    return ((sample + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def train(folder, name, network, diffusion, data, steps, resume_checkpoint=""):
    """Train, and save what all ranks then have of the parameters: their sum."""
    logger.configure(dir=f"{folder}/{name}")
    network.to(dist_util.dev())
    TrainLoop(
        model=network,
        diffusion=diffusion,
        data=data,
        batch_size=BATCH,
        microbatch=-1,
        lr=1e-3,
        ema_rate="0.5",
        log_interval=1,
        save_interval=1,
        resume_checkpoint=resume_checkpoint,
        schedule_sampler=create_named_schedule_sampler("loss-second-moment", diffusion),
        lr_anneal_steps=steps,
    ).run_loop()
    save("sums.npz", gathered(sum(parameter.detach().double().sum() for parameter in network.parameters())[None]))


def image_train(folder):
    seed(1)
    network, diffusion = model_and_diffusion()
    train(folder, "image_train", network, diffusion, pictures(folder), 2)
    network, diffusion = model_and_diffusion()
    train(folder, "resumed", network, diffusion, pictures(folder), 4, f"{folder}/image_train/model000001.pt")


def image_sample(folder):
    logger.configure(dir=f"{folder}/image_sample")
    network, diffusion = model_and_diffusion("--timestep_respacing 3")
    loaded(network, f"{folder}/network.pt")
    for name, loop in {"ddpm": diffusion.p_sample_loop, "ddim": diffusion.ddim_sample_loop}.items():
        for run, number in {"": 2, "_again": 2, "_other": 3}.items():
            seed(number)
            images, labels = [], []
            for _ in range(2):
                classes = torch.randint(low=0, high=NUM_CLASSES, size=(BATCH,), device=dist_util.dev())
                sample = loop(network, (BATCH, 3, SIZE, SIZE), clip_denoised=True, model_kwargs={"y": classes})
                images.append(gathered(pixels(sample)))
                labels.append(gathered(classes))
            save(f"{name}{run}.npz", np.concatenate(images), np.concatenate(labels))


def classifier_train(folder):
    logger.configure(dir=f"{folder}/classifier_train")
    seed(4)
    given = flags(classifier_and_diffusion_defaults(), CLASSIFIER)
    network, diffusion = create_classifier_and_diffusion(**given)
    network.to(dist_util.dev())
    dist_util.sync_params(network.parameters())
    trainer = MixedPrecisionTrainer(model=network, use_fp16=False, initial_lg_loss_scale=16.0)
    parallel = DistributedDataParallel(network, broadcast_buffers=False)
    optimizer = AdamW(trainer.master_params, lr=3e-4)
    schedule_sampler = create_named_schedule_sampler("uniform", diffusion)
    data = pictures(folder, random_crop=True)
    for step in range(2):
        logger.logkv("step", step)
        images, extra = next(data)
        labels = extra["y"].to(dist_util.dev())
        t, _ = schedule_sampler.sample(len(images), dist_util.dev())
        logits = parallel(diffusion.q_sample(images.to(dist_util.dev()), t), timesteps=t)
        loss = functional.cross_entropy(logits, labels, reduction="none")
        log_loss_dict(diffusion, t, {"train_loss": loss.detach()})
        trainer.zero_grad()
        trainer.backward(loss.mean())
        trainer.optimize(optimizer)
        logger.dumpkvs()
    if dist.get_rank() == 0:
        state = trainer.master_params_to_state_dict(trainer.master_params)
        torch.save(state, os.path.join(logger.get_dir(), f"model{step:06d}.pt"))
    dist.barrier()


def classifier_sample(folder):
    logger.configure(dir=f"{folder}/classifier_sample")
    network, diffusion = model_and_diffusion("--timestep_respacing 3")
    loaded(network, f"{folder}/network.pt")
    judge = loaded(classifier(), f"{folder}/classifier.pt")

    def towards(scale):
        def gradient(x, t, y=None):
            with torch.enable_grad():
                x = x.detach().requires_grad_(True)
                log_probs = functional.log_softmax(judge(x, t), dim=-1)
                return torch.autograd.grad(log_probs[range(len(y)), y].sum(), x)[0] * scale

        return gradient

    for name, scale in {"unmoved": 0.0, "moved": 50.0}.items():
        seed(5)
        classes = torch.randint(low=0, high=NUM_CLASSES, size=(BATCH,), device=dist_util.dev())
        sample = diffusion.p_sample_loop(
            lambda x, t, y=None: network(x, t, y),
            (BATCH, 3, SIZE, SIZE),
            model_kwargs={"y": classes},
            cond_fn=towards(scale),
            device=dist_util.dev(),
        )
        save(f"{name}.npz", gathered(pixels(sample)), gathered(classes))


def super_res(folder):
    def data():
        for images, _ in load_data(data_dir=f"{folder}/pictures", batch_size=BATCH, image_size=SIZE):
            yield images, {"low_res": functional.interpolate(images, SMALL_SIZE, mode="area")}

    seed(6)
    network, diffusion = upsampler_and_diffusion()
    train(folder, "super_res_train", network, diffusion, data(), 2)
    logger.configure(dir=f"{folder}/super_res_sample")
    network, diffusion = upsampler_and_diffusion("--timestep_respacing 2")
    loaded(network, f"{folder}/upsampler.pt")
    with np.load(f"{folder}/image_sample/ddpm.npz") as samples:
        first = dist.get_rank() * BATCH
        images = torch.from_numpy(samples["arr_0"][first : first + BATCH]).float() / 127.5 - 1
    low_res = functional.interpolate(images.permute(0, 3, 1, 2), SMALL_SIZE, mode="area").to(dist_util.dev())
    seed(7)
    sample = diffusion.p_sample_loop(network, (BATCH, 3, SIZE, SIZE), model_kwargs={"low_res": low_res})
    save("samples.npz", gathered(pixels(sample)))


def image_nll(folder):
    logger.configure(dir=f"{folder}/image_nll")
    network, diffusion = model_and_diffusion("--timestep_respacing 4")
    loaded(network, f"{folder}/network.pt")
    seed(8)
    images, condition = next(pictures(folder, deterministic=True))
    condition = {name: values.to(dist_util.dev()) for name, values in condition.items()}
    found = diffusion.calc_bpd_loop(network, images.to(dist_util.dev()), clip_denoised=True, model_kwargs=condition)
    own = found["total_bpd"].mean()
    mean = own / dist.get_world_size()
    dist.all_reduce(mean)
    terms = [gathered(found[name]) for name in ("vb", "mse", "xstart_mse")]
    save("terms.npz", *terms, gathered(own[None]), mean.cpu().numpy())


def main(folder):
    torch.set_num_threads(1)
    dist_util.setup_dist()
    for script in (image_train, image_sample, classifier_train, classifier_sample, super_res, image_nll):
        script(folder)
    assert parse_resume_step_from_filename(f"{folder}/image_train/model000001.pt") == 1


if __name__ == "__main__":
    main(sys.argv[1])
