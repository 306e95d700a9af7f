"""The reports of a whole split for validation and evaluation: batches, the progress bar, several processes."""

from collections.abc import Callable, Iterator, Sequence

from tqdm import tqdm

from config import Config
from data import Study, read_views
from rollout import generate_reports
from running import parallel


def batches(items: Sequence, size: int, what: str = "", **bar) -> Iterator[list]:
    """The items in lists of `size`. what: the text of the first process's progress bar; without it there is none."""
    shown = {"desc": f"{what:<28}", "unit": "batch", "mininterval": 1, "disable": not what or parallel.rank() > 0}
    for start in tqdm(range(0, len(items), size), **shown, **bar):
        yield items[start : start + size]


def generate_split(
    model, processor, studies: list[Study], cfg: Config, samples: int = 0, what: str = "", views: Callable = read_views
) -> list[list[str]]:
    """`generate_reports` of all studies, shared out over the processes; every process gets all of them.

    `eval.batch_size` studies are decoded together. Each process has equally many: the tail begins again at the first
    study, and what is written twice is dropped. what: as in `batches`. views: gives the images of a study.
    """
    world, outputs = parallel.world(), []
    mine = [studies[i % len(studies)] for i in range(parallel.rank(), -(-len(studies) // world) * world, world)]
    for some in batches(mine, cfg.eval.batch_size, what):
        ids, images = [study.id for study in some], [views(study) for study in some]
        outputs += generate_reports(model, processor, images, cfg, ids=ids, samples=samples)
    shares = parallel.gather(outputs)
    return [shares[i % world][i // world] for i in range(len(studies))]
