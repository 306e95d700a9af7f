"""The phantom's own models, small versions of the real components in their real layouts on disk.

    data       R2Gen's layout                                     world.py writes it; data_clean: true references
    base       LlavaForConditionalGeneration + processor          sees, but hallucinates as a Med-VLM does;
               base_pooled: over a tower whose patches need not tell every label each
    expert     open_clip folder                                   frozen scorer of Eq. 6, learnt from true reports;
               expert_noisy: from the policy's own references; expert_50, ...: at 50%, ... of their rates of error
    labeller   BERT folder + chexbert.pth in CheXbert's format    clinical reward of Eq. 4, and BERTScore's encoder

`python -m phantom.assets --build data base expert labeller` builds them ahead of a run, which else does on first use.
"""

import sys
from dataclasses import dataclass
from functools import partial

from config import Config, parse
from phantom import cache
from phantom.training import build_base, build_expert, build_labeller
from phantom.world import build, build_clean

BUILDERS = {"data": build, "data_clean": build_clean, "base": build_base,
            "base_pooled": partial(build_base, pooled=True), "labeller": build_labeller,
            "expert": build_expert, "expert_noisy": partial(build_expert, noise=None),
            **{f"expert_{rate}": partial(build_expert, noise=rate / 100) for rate in (50, 100, 150, 200)}}  # fmt: skip
resolve = partial(cache.resolve, builders=BUILDERS)
ensure = partial(cache.ensure, builders=BUILDERS)


@dataclass
class BuildConfig(Config):
    build: tuple[cache.Name, ...] = ("data", "base", "expert", "labeller")  # which to build where they are missing


def main() -> None:
    cfg = parse(BuildConfig, "Build the phantom's data set and models.")
    try:
        for name in cfg.build:
            print(ensure(cfg, name))
    except (ValueError, OSError) as error:
        sys.exit(f"phantom.assets: {error}")


if __name__ == "__main__":
    main()
