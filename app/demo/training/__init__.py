"""How the demo models were trained, one module per model; ``app/demo/train.py`` puts the stages in a row."""
