"""What the tests of searches share: short ones over few images, and a look into their studies."""

import optuna

from compressor import AACP, Compensation, Fitness, LeGR, Target

SMALL = Compensation(images=200, positions=8)
QUICK = Fitness("compensate", holdout=200, images=100)
TARGET = Target("fake", align=4)


def legr(trials=12, **more):
    return LeGR(**{"trials": trials, "fitness": QUICK, "population": 8, "compensation": SMALL, **more})


class Unfilled(LeGR):
    """Notches that a budget still allows stay away."""

    fills = False


def unfilled(trials=12, **more):
    return Unfilled(**{"trials": trials, "fitness": QUICK, "population": 8, "compensation": SMALL, **more})


def aacp(trials=12, **more):
    return AACP(**{"trials": trials, "steps": "align", "fitness": QUICK, "population": 5, "compensation": SMALL, **more})


def study_of(url):
    (summary,) = optuna.get_all_study_summaries(url)
    return optuna.load_study(study_name=summary.study_name, storage=url)


def macs_of(problem):
    return lambda rows: problem.channels.costs.macs(rows).astype(float)
