"""Rewards of study.py, by FILE.py:FUNCTION: the judge of the small world, watched, a second proxy, caps.

By hand, `second` once study.py has built its model (for the judge the one of --tiny scores the same):

    python rsaft.py --tiny --reward pickscore=0.5 experiments/study_rewards.py:second=0.5
    python rsaft.py --tiny --reward experiments/study_rewards.py:capped_27
"""
import functools
from pathlib import Path

import rsaft

EMBEDDINGS = []      # of all pictures that this process's judge has scored, in order; study.py clears them
WORLDS = Path(__file__).resolve().parent / "worlds"      # study.py may put another folder here


@functools.cache
def load_judge():
    from transformers import CLIPModel
    folder = Path(rsaft.TINY["models"], "judge")
    model = rsaft.load_complete(CLIPModel, folder)
    model.visual_projection.register_forward_hook(lambda *call: EMBEDDINGS.append(call[-1].detach()))
    return rsaft.clip_reward(model, folder, "cpu", model.logit_scale.exp().item())


@functools.cache
def load_proxy(folder):
    return rsaft.load_pickscore(dict.fromkeys(rsaft.PICKSCORE_FILES, folder), "cpu")


def judge(images, prompts):
    """The score of the judge in tiny/, (B,); the image embeddings that it computes go to EMBEDDINGS."""
    return load_judge()(images, prompts)


def capped(cap, images, prompts):
    """The score of the proxy, (B,), but at most `cap`: from there on without a gradient."""
    return load_proxy(Path(rsaft.TINY["models"], "pickscore"))(images, prompts).clamp(max=cap)


capped_26, capped_27, capped_28 = (functools.partial(capped, cap) for cap in (26, 27, 28))


def second(images, prompts):
    """The score of the proxy that study.py builds beside the first, (B,)."""
    return load_proxy(WORLDS / "second" / "second")(images, prompts)
