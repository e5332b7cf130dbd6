"""draftline's core: the whole of online, disaggregated draft training, without an orchestrator.

Floors, imports point downwards only: ``cli`` - ``rollout``, ``training``, ``evaluation`` - ``drafts``, ``channel``,
``store``, ``observability`` - ``plan``, ``run_dir``, ``run_spec``, ``settings`` - ``errors``, ``contracts``.
"""

__version__ = "0.1.0"
