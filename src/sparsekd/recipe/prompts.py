"""What models are asked to go on from, unless a recipe has prompts of its own: ten beginnings of different kinds."""

PROMPTS = (
    "The capital of France is",
    "Photosynthesis is the process by which",
    "The sky is blue because",
    "The days of the week are Monday, Tuesday,",
    "To make a cup of tea, first",
    "Question: Anna has 12 apples and gives 5 of them to Ben. How many apples does she have left?\nAnswer:",
    "Once upon a time, in a village at the edge of a dark forest, there lived",
    "Customer: Excuse me, this soup is cold.\nWaiter:",
    "Dear Ms Miller,\n\nThank you for your letter. I am sorry to hear that",
    'def is_prime(n):\n    """Whether n is a prime number."""\n    if',
)
