"""The reports of a whole split for validation and evaluation: batches, the progress bar, several processes."""

from tqdm import tqdm

from config import Config
from data import Study, read_views
from rollout import generate_reports
from running import parallel


def generate_split(
    model, processor, studies: list[Study], cfg: Config, samples: int = 0, what: str = ""
) -> list[list[str]]:
    """`generate_reports` of all studies, shared out over the processes; every process gets all of them.

    `eval.batch_size` studies are decoded together. Each process has equally many: the tail begins again at the first
    study, and what is written twice is dropped. what: the progress bar's text; without it there is none.
    """
    world, rank, size, outputs = parallel.world(), parallel.rank(), cfg.eval.batch_size, []
    mine = [studies[i % len(studies)] for i in range(rank, -(-len(studies) // world) * world, world)]
    starts = range(0, len(mine), size)
    for start in tqdm(starts, desc=f"{what:<28}", unit="batch", mininterval=1, disable=not what or rank > 0):
        batch = mine[start : start + size]
        views = [read_views(study) for study in batch]
        outputs += generate_reports(model, processor, views, cfg, ids=[study.id for study in batch], samples=samples)
    shares = parallel.gather(outputs)
    return [shares[i % world][i // world] for i in range(len(studies))]
