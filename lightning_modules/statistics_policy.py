"""A policy that tells more of each target's distribution than its log-probability."""

from collections.abc import Collection

from torch import Tensor

from rewarm.functional.document_attention import Documents
from rewarm.functional.token_statistics import Statistic, token_statistics
from rewarm.lightning_modules.policy import Policy


class StatisticsPolicy(Policy):
    """A causal language model whose forward also returns statistics of each target's distribution.

    Args:
        model: Any transformers causal language model with a plain linear head.
        backend: How log-probabilities are computed, see `rewarm.functional.logprob.token_logprobs`.
    """

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        targets: Tensor,
        temperature: float = 1.0,
        statistics: Collection[Statistic] = (),
        candidates: Tensor | None = None,
        documents: Documents | None = None,
        num_targets: int | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """Return log-probabilities of the targets, as `Policy` does; or a mapping with more.

        Args:
            input_ids: Shape (B, T).
            position_ids: Shape (B, T).
            targets: The token that follows each position, -100 where there is none to learn. Shape (B, T).
            temperature: Divides the logits, > 0.
            statistics: Names of `rewarm.functional.token_statistics.token_statistics`.
            candidates: Token ids whose log-probabilities are wanted. Shape (B, T, K).
            documents: As in `Policy`.
            num_targets: As in `Policy`.

        Returns:
            Log-probabilities in nats, shape (B, T); with statistics these as `logprobs`, and each by its
            name, 0 where there is no target.
        """
        if not statistics:
            return super().forward(input_ids, position_ids, targets, temperature, documents, num_targets)
        hidden = self.hidden_states(input_ids, position_ids, documents)
        head = self.model.get_output_embeddings()
        values = token_statistics(
            hidden.flatten(0, 1),
            head.weight,
            targets.flatten(),
            statistics,
            candidates=None if candidates is None else candidates.flatten(0, 1),
            bias=head.bias,
            temperature=temperature * self.logit_temperature,
            softcap=self.softcap,
            backend=self.backend,
            num_targets=num_targets,
        )
        # Copies, as in `Policy`.
        return {name: value.unflatten(0, targets.shape).clone() for name, value in values.items()}
