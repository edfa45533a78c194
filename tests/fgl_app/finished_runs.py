"""What the made-up runs of these tests contain."""

PROMPT = "seven <script>alert('$1')</script> & seven"


def a_row(number: int, accuracy: float, **more: object) -> dict:
    sent = 0 if number == 1 else 44_800_000
    return {
        "round": number,
        "phase": "one-shot" if number == 1 else "federated",
        "accuracy": accuracy,
        "loss": 1.5 / number,
        "validation_accuracy": accuracy - 0.05,
        "domain_accuracy": {"ink": accuracy, "chalk": accuracy - 0.1},
        "accuracy_macro": accuracy - 0.05,
        "model_upload_bytes": sent,
        "upload_bytes": 3 * sent + 700 * (number == 1),
        "clients": 3 * (number > 1),
        "seconds": 12.3,
        **more,
    }


def without_optional(row: dict) -> dict:
    return {key: value for key, value in row.items() if key not in ("domain_accuracy", "accuracy_macro", "clients")}
