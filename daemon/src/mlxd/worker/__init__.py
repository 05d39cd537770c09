"""What runs inside a worker process: one loaded model and the requests that decode on it in one batch.

    __main__   starts the process and says `ready`
    blas       which library multiplies matrices on a Linux CPU
    alias      its functions, under the names that MLX calls
    threads    how many threads it uses, as the machine has cores to spare
    powers     softmax and SiLU on an x86 CPU
    early      a step is computed while the rest of it is still described
    loop       the pipe, one decode step, the pipe again
    load       a folder becomes a LoadedModel, or a typed error
    families   what architectures cannot do in a batch
    options    what a request asks for, what the model defaults to, what is refused
    prompt     messages become tokens, through the model's chat template
    turns      the turns of a conversation, checked
    templates  what a chat template may build
    timelimit  how long code may run that is not ours
    tools      the tools of a request, checked
    toolsyntax how families of models spell calls
    toolflat   those that spell argument by argument
    calls      tool calls out of what a model wrote
    shorten    which messages of a conversation go where it is too long
    images     an image of a request becomes pixels, or a typed error
    vision     a model that sees: mlx-vlm's, in two halves
    sights     prompts with images, on their way into the batch
    engine     one model and all that is asked of it; a step goes on with all of it
    requests   a request, read: options completed, prompt built; or refused
    arrivals   the way of a request before it joins the batch
    decoding   the requests in the batch, and how each ends
    running    one request in flight, and what a step brought
    results    what one answer is once it ended
    faults     whose an error is: a request's own, or the device's
    keeping    what is kept of what was computed for requests
    givingback memory that is free goes back to the system
    warming    what the first request would otherwise wait for
    answers    several answers to one prompt, as one result
    lanes      a batch for each kind of rows that cannot share one, and whose turn it is
    lanecaches what rows decode on there, and what caches weigh
    admission  rows wait, or are refused, so that their caches fit
    patience   prompts that can wait step aside for those that cannot
    batch      mlx_lm's BatchGenerator: which prompts are read when, and which rows decode
    rows       the rows that decode together, with sampling for all of them in one call
    places     where they lie in the caches, and what one leaves behind
    prefix      which prefixes of prompts are kept, and which go first
    kvcache     their arrays: out of a batch, and into another row
    diskcache   the same beyond this process
    layout      what caches are made of, as bytes
    waits       prompts that wait for one that begins alike
    grammar    schemas and grammars, compiled; or refused
    trial      compiles in a process that may be lost
    constraint what one answer may go on with, as masks over a batch's logits
    adapters   the LoRA and DoRA adapters beside the model: read, kept, let go
    adapterfile an adapter's folder becomes what it does to each layer
    adapted    layers that compute adapters, for rows with different ones
    sampling   penalties, filters and seeded draws, for a whole batch
    speculation guesses ahead: whose they are, and what checking them takes
    lookup     guesses by looking up what was said before
    draft      guesses by a smaller model
    pace       what passes take, and how many guesses are worth one
    text       tokens become text: whole characters, stop strings, reasoning apart
    tokens     texts as tokens, and back
    embed      vectors for texts, a part at a time
    pooling    how a folder says that a vector is made

Only this package imports mlx, and only inside a worker.
"""
