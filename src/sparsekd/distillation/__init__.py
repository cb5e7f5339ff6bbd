"""Training to match the teacher. In: a student, blocks, a teacher; out: the trained student and its curves."""

from sparsekd.distillation.checkpoint import on_host as on_host
from sparsekd.distillation.history import METRICS as METRICS
from sparsekd.distillation.history import History as History
from sparsekd.distillation.history import Step as Step
from sparsekd.distillation.history import history_of as history_of
from sparsekd.distillation.history import reason_to_stop as reason_to_stop
from sparsekd.distillation.loop import distill as distill
from sparsekd.distillation.loop import measure as measure
from sparsekd.distillation.loop import train as train
from sparsekd.distillation.losses import kd_loss as kd_loss
from sparsekd.distillation.objective import Data as Data
from sparsekd.distillation.objective import Objective as Objective
from sparsekd.distillation.objective import Teacher as Teacher
from sparsekd.distillation.objective import make_batch as make_batch
from sparsekd.distillation.objective import require_document_mask as require_document_mask
from sparsekd.distillation.worker import require_splittable as require_splittable
