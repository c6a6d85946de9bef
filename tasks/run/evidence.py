"""The evidence of an adapter that is published: of two stages, its promotion and its evaluation."""

import logging
import posixpath

from tasks.config import PromotionConfig, PublishingConfig
from tasks.errors import PreflowError
from tasks.evaluate.evidence import collect_evidence
from tasks.promote.pointer import Entry
from tasks.store.workspace import MANIFEST, EvaluationRef, Workspace

logger = logging.getLogger(__name__)


def published_evidence(entry: Entry, publishing: PublishingConfig) -> bytes | None:
    """Return the evidence of a pointer's entry; None, with a warning, where it is gone and is not to be uploaded.

    Raises:
        PreflowError: it is to be uploaded, and not all of it is there.
    """
    won = entry.evaluation
    bars = PromotionConfig(min_win_rate=won.min_win_rate, min_agreement=won.min_agreement)
    try:
        manifest = Workspace.holding(won.uri).read_manifest(posixpath.join(posixpath.dirname(won.uri), MANIFEST))
        evaluation = EvaluationRef.model_validate(manifest.artifact.model_dump())
        return collect_evidence(evaluation, bars).text()
    except PreflowError as error:
        if publishing.evidence:
            raise
        logger.warning("the model card names no evidence: %s", error)
        return None
