"""A run on disk. In: a recipe and a folder; out: finished stages, reused when nothing they are made of has changed."""

from sparsekd.run.directory import Run as Run
from sparsekd.run.dry_run import Estimate as Estimate
from sparsekd.run.dry_run import estimate as estimate
from sparsekd.run.inspection import diagnose as diagnose
from sparsekd.run.machine import memory_bytes as memory_bytes
from sparsekd.run.machine import peak_memory_bytes as peak_memory_bytes
from sparsekd.run.machine import reset_peak_memory as reset_peak_memory
from sparsekd.run.machine import versions as versions
from sparsekd.run.reading import Summary as Summary
from sparsekd.run.reading import is_run as is_run
from sparsekd.run.reading import read_manifest as read_manifest
from sparsekd.run.reading import read_recipe as read_recipe
from sparsekd.run.reading import read_summary as read_summary
from sparsekd.run.rounds import ARMS as ARMS
from sparsekd.run.rounds import CORPUS as CORPUS
from sparsekd.run.rounds import SHARED_CACHE as SHARED_CACHE
from sparsekd.run.rounds import Place as Place
from sparsekd.run.rounds import Round as Round
from sparsekd.run.rounds import folder_of as folder_of
from sparsekd.run.rounds import planned as planned
from sparsekd.run.rounds import split as split
from sparsekd.run.settings import settings_of as settings_of
from sparsekd.run.stages import OF_ROUND as OF_ROUND
from sparsekd.run.stages import STAGES as STAGES
from sparsekd.run.stages import folders_of as folders_of
from sparsekd.run.work import Work as Work
