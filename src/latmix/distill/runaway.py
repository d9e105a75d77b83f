"""When learning has run away, and what to say then.

A loss or a gradient that is no number ends a stage before the step is taken. So does a held-out KL that stays far above
its start, which no schedule comes back from. Given up: clipping gradients, or leaving such steps out: both hide a rate
that is too large.
"""

from latmix.distill.snapshot import Course
from latmix.errors import DivergedError
from latmix.recipe import Distillation

TIMES, IN_A_ROW = 10.0, 3
"""So many times its start, in so many measurements in a row, is a held-out KL that has run away."""


def check_held_out(course: Course, schedule: Distillation) -> None:
    """Raises: DivergedError: the last measurements are all far above the first."""
    start, *later = course.measured
    last = later[-IN_A_ROW:]
    if len(last) == IN_A_ROW and not any(value <= TIMES * start for value in last):  # NaN is far above, too
        raise diverged(f"the held-out KL is {last[-1]:.3g} and began at {start:.3g}", course, schedule)


def diverged(what: str, course: Course, schedule: Distillation) -> DivergedError:
    """What to raise after the last step of this course."""
    return DivergedError(
        f"Learning diverged after step {course.step}: {what}; choose a smaller {schedule.key}.lr than {schedule.lr}. "
        f"The best state so far is kept; the lowest held-out KL was {course.best:.4g}."
    )
