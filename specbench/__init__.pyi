from specbench.data.loading.online import OnlineTarget as OnlineTarget
from specbench.data.loading.target_cache import TargetCache as TargetCache
from specbench.drafts.dflash import DFlash as DFlash
from specbench.drafts.dflash2 import DFlash2 as DFlash2
from specbench.drafts.domino import Domino as Domino
from specbench.drafts.draft import Draft as Draft
from specbench.drafts.dspark import DSpark as DSpark
from specbench.drafts.eagle3 import Eagle3 as Eagle3
from specbench.drafts.jetspec import JetSpec as JetSpec
from specbench.drafts.mtp import MTP as MTP
from specbench.drafts.p_eagle import PEagle as PEagle
from specbench.library.answers import answer as answer
from specbench.library.comparison import compare as compare
from specbench.library.drafts import load_draft as load_draft
from specbench.library.evaluation import Estimate as Estimate
from specbench.library.evaluation import Evaluation as Evaluation
from specbench.library.evaluation import evaluate as evaluate
from specbench.library.training import Trained as Trained
from specbench.library.training import Trainer as Trainer
from specbench.library.training import train as train
from specbench.losses.objective import Objective as Objective
from specbench.models.target import Target as Target
from specbench.training.callbacks import DecodeProbe as DecodeProbe
from specbench.training.draft_training import DraftTraining as DraftTraining

__all__ = [
    "MTP",
    "DFlash",
    "DFlash2",
    "DSpark",
    "DecodeProbe",
    "Domino",
    "Draft",
    "DraftTraining",
    "Eagle3",
    "Estimate",
    "Evaluation",
    "JetSpec",
    "Objective",
    "OnlineTarget",
    "Target",
    "TargetCache",
    "Trained",
    "Trainer",
    "answer",
    "compare",
    "evaluate",
    "load_draft",
    "train",
]
