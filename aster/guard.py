"""What a run does when the collapse alarm is on, where `collapse.on_alarm` asks for more than a word in the log.

`stop` ends the run. `rollback` takes it back to the newest checkpoint from before the alarm, and on from there:

    step            8    9   10   11   12   13         10 is the newest healthy checkpoint: the rollouts of step 11,
    checkpoint                ^                        which its weights sampled, were within the limits
    alarm                               ON             since step 12, so step 11's weights may already be ill
    data position   8    9   10   11   12   13 | 14    after the roll-back step 11 trains on the prompts of step 14

Weights, optimizer moments, schedule and the learner's random state go back, and so do the step number and what the
alarm remembers. Two things differ from the steps that were rolled back: the prompts, since the data goes on where it
was, and the samples drawn. So it can leave a bad draw behind: an unlucky batch, a spike, a sandbox that was down. It
cannot cure a cause that is still there (a reward that pays for not calling, a learning rate that is too high): the same
slope leads down again, and after `max_rollbacks` the run ends. The steps between are lost, their prompts are not
trained on, their files in rollout_data and trajectories are overwritten when their numbers come again. Their
checkpoints and validations stay, with the ending `.rolled_back`, for whoever wants to look; nobody removes them.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Protocol

from aster.config import CollapseConfig
from aster.errors import CollapseStopped
from aster.roles import Checkpointer, LearnerGroup

log = logging.getLogger(__name__)


class Alarms(Protocol):
    """Who knows about the alarm (`tracking.Tracker`)."""

    @property
    def alarm_since(self) -> int | None: ...

    def event(self, step: int, kind: str, message: str) -> None: ...


@dataclass
class CollapseGuard:
    """Ask it after every step, when the step's metrics are logged."""

    config: CollapseConfig
    alarms: Alarms
    rollbacks: int = 0
    _helpless: int | None = None  # onset of the spell that could not be rolled back, said once

    async def after_step(self, step: int, *, checkpoints: Checkpointer | None, learners: LearnerGroup) -> int | None:
        """None: go on. A number: the learners are back at that step, whose weights have to be published.

        Raises `CollapseStopped` where the run is to end.
        """
        since = self.alarms.alarm_since
        if since is None or self.config.on_alarm == "log":
            return None
        if self.config.on_alarm == "stop":
            raise CollapseStopped(
                f"interaction collapse since step {since}, and collapse.on_alarm=stop: the run ends at step {step}; "
                f"checkpoints of step {max(since - 2, 0)} and before are from healthy weights"
            )
        if self.rollbacks >= self.config.max_rollbacks:
            raise CollapseStopped(
                f"interaction collapse since step {since}, again after {self.rollbacks} roll-back(s), which is "
                f"collapse.max_rollbacks: what leads there is no bad luck. Look at the reward, at failures of the "
                f"sandbox and at optim.lr before going on from the newest checkpoint"
            )
        path = None if checkpoints is None else await checkpoints.roll_back(since - 2)
        if path is None or checkpoints is None:
            if self._helpless != since:
                self._helpless = since
                self.alarms.event(
                    step,
                    "rollback_impossible",
                    f"no checkpoint of step {since - 2} or before is kept: the run goes on (run.save_every, "
                    "run.keep_checkpoints)",
                )
            return None
        state = await checkpoints.restore(path, learners)
        self.rollbacks += 1
        back = int(str(state["step"]))
        self.alarms.event(
            step,
            "rollback",
            f"back to {path}, from before the alarm of step {since}; on with step {back + 1} and other prompts "
            f"({self.rollbacks} of {self.config.max_rollbacks} roll-backs)",
        )
        return back
