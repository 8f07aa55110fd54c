"""DEIS sampler."""

from __future__ import annotations

import comfy.samplers
from comfy_api.latest import io


class DXDEISExact(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DXDEISExact",
            display_name="DEIS Sampler (exact)",
            category="diffusers-ext/schedulers",
            description="All variants of DEIS with exactly integrated weights. tAB uses the time of the model that is "
            "connected, whatever its noise schedule.",
            search_aliases=["deis", "tab", "rhoab", "ipndm", "exponential integrator", "sampler"],
            inputs=[
                io.Combo.Input(
                    "method",
                    options=["t_ab", "rho_ab", "logrho_ab", "ipndm", "rho_rk"],
                    default="t_ab",
                    tooltip="Polynomial in the model's time (t_ab), in sigma (rho_ab) or in log sigma (logrho_ab); "
                    "constant weights (ipndm); Runge-Kutta with several model calls per step (rho_rk).",
                ),
                io.Int.Input(
                    "order",
                    default=3,
                    min=0,
                    max=4,
                    tooltip="Degree of the polynomial; 0 is DDIM (Euler), ipndm goes up to 3. Not used by rho_rk.",
                ),
                io.Combo.Input(
                    "rk_method",
                    options=["1euler", "2heun", "3kutta", "3ral", "3heun", "3vdh", "3ssprk", "4rk"],
                    default="3kutta",
                    tooltip="Method of rho_rk. The digit is its order and the number of model calls per step.",
                ),
            ],
            outputs=[io.Sampler.Output(tooltip="For SamplerCustom or SamplerCustomAdvanced.")],
        )

    @classmethod
    def validate_inputs(cls, method, order):
        """Refuse what the solver would refuse, before the queue."""
        ok = order in range(4 if method == "ipndm" else 5)
        return ok or f"order is {order}; accepted: 0 to {3 if method == 'ipndm' else 4}"

    @classmethod
    def execute(cls, method, order, rk_method) -> io.NodeOutput:
        from diffusers_ext.schedulers.deis import sample_deis

        options = {"method": method, "ab_order": order, "rk_method": rk_method}
        return io.NodeOutput(comfy.samplers.KSAMPLER(sample_deis, options))


NODES = [DXDEISExact]
