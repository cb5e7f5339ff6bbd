"""What the teacher believes. In: a model and blocks; out: a cache of its next-token distributions, read by block."""

from sparsekd.teacher.cache import Cache as Cache
from sparsekd.teacher.cache import tokens_hash as tokens_hash
from sparsekd.teacher.codecs import CODECS as CODECS
from sparsekd.teacher.codecs import Samples as Samples
from sparsekd.teacher.codecs import Targets as Targets
from sparsekd.teacher.codecs import codec_for as codec_for
from sparsekd.teacher.filling import cache_teacher as cache_teacher
from sparsekd.teacher.filling import fill as fill
from sparsekd.teacher.merging import forget_shares as forget_shares
from sparsekd.teacher.merging import is_cached as is_cached
from sparsekd.teacher.merging import merge_shares as merge_shares
from sparsekd.teacher.online import Mixture as Mixture
from sparsekd.teacher.online import Online as Online
from sparsekd.teacher.online import TeacherModel as TeacherModel
from sparsekd.teacher.online import distributions as distributions
from sparsekd.teacher.online import members as members
from sparsekd.teacher.selecting import top_k_distribution as top_k_distribution
