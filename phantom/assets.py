"""What is built on first use: the phantom and its models, small versions of the real components in their real layouts.

    data       R2Gen's layout                                     world.py writes it; data_clean: true references
    base       LlavaForConditionalGeneration + processor          sees, but hallucinates as a Med-VLM does;
               base_pooled: over a tower whose patches need not tell every label each
    expert     open_clip folder                                   frozen scorer of Eq. 6, learnt from true reports;
               expert_noisy: from the policy's own references; expert_50, ...: at 50%, ... of their rates of error
    labeller   BERT folder + chexbert.pth in CheXbert's format    clinical reward of Eq. 4, and BERTScore's encoder

`tiny:base`, `tiny:expert` and `tiny:labeller` are the same three, built from the training split of cfg.data instead.
`python -m phantom.assets --build data base expert labeller` builds ahead of a run, which else does on first use.
"""

from dataclasses import dataclass
from functools import partial

from config import Config, parse
from phantom import cache
from phantom.training import build_base, build_expert, build_labeller
from phantom.world import build, build_clean
from running import parallel
from tiny.build import TINY_BUILDERS

BUILDERS = {"data": build, "data_clean": build_clean, "base": build_base,
            "base_pooled": partial(build_base, pooled=True), "labeller": build_labeller, **TINY_BUILDERS,
            "expert": build_expert, "expert_noisy": partial(build_expert, noise=None),
            **{f"expert_{rate}": partial(build_expert, noise=rate / 100) for rate in (50, 100, 150, 200)}}  # fmt: skip
resolve = partial(cache.resolve, builders=BUILDERS)
ensure = partial(cache.ensure, builders=BUILDERS)


@dataclass
class BuildConfig(Config):
    # which to build where they are missing
    build: tuple[cache.Name | cache.TinyName, ...] = ("data", "base", "expert", "labeller")


@parallel.script("phantom.assets")
def main() -> None:
    cfg = parse(BuildConfig, "Build the phantom and its models, or those of a data set.")
    for name in cfg.build:
        print(ensure(cfg, name))


if __name__ == "__main__":
    main()
