"""What a recipe may say. In: a YAML file, a preset or a model's name; out: a checked `Recipe`. No torch here."""

from sparsekd.recipe.fields import PASSING as PASSING
from sparsekd.recipe.fields import Range as Range
from sparsekd.recipe.methods import method_named as method_named
from sparsekd.recipe.methods import method_names as method_names
from sparsekd.recipe.names import EMBEDDED_MODEL as EMBEDDED_MODEL
from sparsekd.recipe.names import expanded as expanded
from sparsekd.recipe.names import model_name as model_name
from sparsekd.recipe.presets import PRESETS as PRESETS
from sparsekd.recipe.prompts import PROMPTS as PROMPTS
from sparsekd.recipe.reading import compress_section as compress_section
from sparsekd.recipe.reading import distill_section as distill_section
from sparsekd.recipe.reading import load_recipe as load_recipe
from sparsekd.recipe.rules import LORA_FILLS_ZEROS as LORA_FILLS_ZEROS
from sparsekd.recipe.rules import check as check
from sparsekd.recipe.rules import check_text_name as check_text_name
from sparsekd.recipe.sections import Compress as Compress
from sparsekd.recipe.sections import Corpus as Corpus
from sparsekd.recipe.sections import Distill as Distill
from sparsekd.recipe.sections import RateScale as RateScale
from sparsekd.recipe.sections import Recipe as Recipe
from sparsekd.recipe.sections import Source as Source
from sparsekd.recipe.sections import Teacher as Teacher
from sparsekd.recipe.sections import Text as Text
from sparsekd.recipe.writing import as_dict as as_dict
from sparsekd.recipe.writing import as_yaml as as_yaml
from sparsekd.recipe.writing import inputs_of as inputs_of
