"""Trainers of other libraries, fed by our producers. Each needs its library, and nothing here imports one by itself."""
