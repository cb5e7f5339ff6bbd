"""What the teacher believes. In: a model and blocks; out: a cache of its next-token distributions, read by block."""

from sparsekd.teacher.cache import WHOLE as WHOLE
from sparsekd.teacher.cache import Cache as Cache
from sparsekd.teacher.cache import Part as Part
from sparsekd.teacher.cache import Samples as Samples
from sparsekd.teacher.cache import Targets as Targets
from sparsekd.teacher.cache import tokens_hash as tokens_hash
from sparsekd.teacher.codecs import CODECS as CODECS
from sparsekd.teacher.codecs import codec_for as codec_for
from sparsekd.teacher.filling import Mixture as Mixture
from sparsekd.teacher.filling import Online as Online
from sparsekd.teacher.filling import TeacherModel as TeacherModel
from sparsekd.teacher.filling import cache_teacher as cache_teacher
from sparsekd.teacher.filling import distributions as distributions
from sparsekd.teacher.filling import fill as fill
from sparsekd.teacher.filling import top_k_distribution as top_k_distribution
