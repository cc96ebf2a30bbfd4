from dataclasses import dataclass, field
@dataclass(frozen=True)
class Case:
    title: str
    program: str
    argv: tuple = ()
    cause: str = ""
    step: str = ""
    prepare: object = None
    start: str = "empty"
    code: int = 2
    hub: object = None
    bound: bool = False
    environment: dict = field(default_factory=dict)
CASES=[Case("x","refine/refine_all",("--frob",),"frob","--help"),Case("y","train/train_00_plain_text",("--max-steps", "1","--base-model","/tmp"),"no model","it takes",start="chain")]
