"""Tasks with labels: each module trains one small classifier and holds back the examples that it is judged by."""
