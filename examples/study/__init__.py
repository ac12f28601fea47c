"""The parts of `examples/secrets_study.py`: arms, findings, runs, statistics, pictures, page."""
