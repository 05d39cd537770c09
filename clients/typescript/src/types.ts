// Written by `tools/dev.py draw` from the daemon's method table; what the fields mean: docs/wire.md.

export interface Alternative {
  text: string;
  finish_reason: "cancelled" | "length" | "stop" | "tool_calls";
  completion_tokens: number;
  reasoning?: string;
  tool_calls?: ToolCall[];
  structured?: unknown;
  logprobs?: TokenLogprob[];
  invented?: string[];
}

export interface BadFile {
  file: string;
  reason: string;
}

export interface BatchAppendParams {
  job: string;
  items: (ProcessItem | ChatItem)[];
  at?: number;
}

export interface BatchDeleteParams {
  job: string;
  cancel?: boolean;
}

export interface BatchResult {
  index: number;
  custom_id?: string;
  result?: Completion;
  error?: ErrorObject;
}

export interface BatchResultsParams {
  job: string;
  after?: number;
  limit?: number;
}

export interface BatchResultsResult {
  results: BatchResult[];
  more?: boolean;
  complete?: boolean;
}

export interface BatchSubmitParams {
  items?: (ProcessItem | ChatItem)[];
  model?: string;
  key?: string;
  name?: string;
  open?: boolean;
}

export interface CacheInMemory {
  hits?: number;
  misses?: number;
  saved_tokens?: number;
  bytes?: number;
}

export interface CacheOnDisk {
  entries?: number;
  bytes?: number;
  last_used_at?: number;
  hits?: number;
  saved_tokens?: number;
  failures?: number;
}

export interface CacheResult {
  models: ModelCache[];
  disk_bytes: number;
  memory_budget_bytes: number;
  disk_budget_bytes: number;
}

export interface CancelJobParams {
  job: string;
  discard?: boolean;
}

export interface CancelParams {
  id: number | string;
}

export interface CancelResult {
  cancelled: boolean;
}

export interface CatalogEntry {
  model: string;
  uses: string[];
  size_bytes: number;
  memory_bytes: number;
  smallest_mac_gb: number;
  name?: string;
  note?: string;
  default?: boolean;
  state?: "Downloaded" | "Downloading" | "Loading" | "NotDownloaded" | "Ready";
  fits?: boolean;
}

export interface CatalogResult {
  entries: CatalogEntry[];
  memory_bytes: number;
}

export interface ChatItem {
  method: "chat";
  params: ChatParams;
  custom_id?: string;
}

export interface ChatParams {
  model?: string;
  max_tokens?: number;
  temperature?: number;
  top_p?: number;
  top_k?: number;
  min_p?: number;
  repetition_penalty?: number;
  presence_penalty?: number;
  frequency_penalty?: number;
  logit_bias?: Record<string, number>;
  seed?: number;
  stop?: string[];
  logprobs?: number;
  schema?: Record<string, unknown> | boolean;
  grammar?: string;
  thinking?: boolean;
  keep_alive?: number;
  timeout_s?: number;
  cache_prompt?: boolean;
  xtc_probability?: number;
  xtc_threshold?: number;
  thinking_budget?: number;
  n?: number;
  adapter?: string;
  speculation?: "auto" | "draft" | "lookup" | "off";
  context_policy?: "drop_oldest" | "refuse" | "rotate";
  kv_bits?: 4 | 8;
  deterministic?: boolean;
  stream?: boolean;
  priority?: "batch" | "interactive";
  persona?: string;
  messages: Message[];
  tools?: Record<string, unknown>[];
  tool_choice?: string | Record<string, unknown>;
}

export interface ClearCacheParams {
  model?: string;
}

export interface ClearCacheResult {
  memory_bytes: number;
  disk_bytes: number;
}

export interface ClientInfo {
  name: string;
  version?: string;
}

export interface ClientTotals {
  open: number;
  subscribers: number;
  accepted: number;
  refused: number;
  refused_requests?: Record<string, Record<string, number>>;
}

export interface Completion {
  model: string;
  text: string;
  finish_reason: "cancelled" | "length" | "stop" | "tool_calls";
  usage: Usage;
  timings: Timings;
  reasoning?: string;
  tool_calls?: ToolCall[];
  malformed_tool_calls?: MalformedToolCall[];
  structured?: unknown;
  logprobs?: TokenLogprob[];
  invented?: string[];
  adapter?: string;
  speculation?: Speculation;
  alternatives?: Alternative[];
  dropped_messages?: number;
  alone?: boolean;
}

export interface ConfigChange {
  path: string;
  changed?: string[];
  restart?: string[];
  overridden?: Record<string, string>;
}

export interface ConfigResult {
  path: string;
  settings: Record<string, SettingValue>;
  error?: ErrorObject;
  restart?: string[];
  warnings?: string[];
}

export interface DecodeParams {
  tokens: number[];
  model?: string;
}

export interface DecodeResult {
  text: string;
}

export interface DeleteResult {
  freed_bytes: number;
}

export interface Distribution {
  count: number;
  mean: number;
  stddev: number;
  least: number;
  most: number;
  p50: number;
  p90: number;
  p95: number;
  p99: number;
}

export interface DownloadParams {
  model: string;
  revision?: string;
  repair?: boolean;
}

export interface DownloadResult {
  job: string;
}

export interface DownloadTotals {
  ended?: Record<string, number>;
  fetched_bytes?: number;
}

export interface EmbedParams {
  input: string[];
  model?: string;
  dimensions?: number;
  normalize?: boolean;
  truncate?: boolean;
  encoding?: "base64" | "float";
  keep_alive?: number;
  timeout_s?: number;
}

export interface EmbedResult {
  model: string;
  dimensions: number;
  usage: EmbedUsage;
  vectors?: number[][];
  base64?: string[];
}

export interface EmbedUsage {
  prompt_tokens: number;
}

export type Empty = Record<string, never>;

export interface EncodeParams {
  text: string;
  model?: string;
  special?: boolean;
  pieces?: boolean;
}

export interface EncodeResult {
  tokens: number[];
  pieces?: string[];
}

export interface ErrorObject {
  kind: string;
  message: string;
  details?: Record<string, unknown>;
}

export interface Event {
  subscription: number;
  rev: number;
  name: string;
  at: number;
  model_id?: string;
  progress?: number;
  error?: ErrorObject;
  model?: Model;
  job?: Job;
  request?: string;
  details?: Record<string, unknown>;
  dropped?: number;
  snapshot?: Snapshot;
}

export interface EventTotals {
  published: number;
  dropped: number;
  lagged: number;
}

export interface GetConfigParams {
  names?: string[];
}

export interface HelloParams {
  protocol: [number, number];
  client: ClientInfo;
}

export interface HelloResult {
  protocol: number;
  server: ServerInfo;
  epoch: string;
  limits: Limits;
  capabilities: string[];
  protocols?: [number, number];
}

export interface ImagePart {
  type: "image";
  path?: string;
  data?: string;
}

export interface ImageUrl {
  url: string;
  detail?: "auto";
}

export interface ImageUrlPart {
  type: "image_url";
  image_url: ImageUrl;
}

export interface Job {
  job: string;
  kind: "batch" | "download" | "load";
  state: "cancelled" | "done" | "failed" | "queued" | "running";
  model?: string;
  progress?: number;
  attempts?: number;
  phase?: string;
  done_bytes?: number;
  total_bytes?: number;
  rate_bytes_s?: number;
  revision?: string;
  name?: string;
  total_items?: number;
  done_items?: number;
  failed_items?: number;
  error?: ErrorObject;
  started_at?: number;
  ended_at?: number;
}

export interface JobParams {
  job: string;
}

export interface JobsResult {
  jobs: Job[];
}

export interface Lease {
  lease: string;
  model: Model;
}

export interface LeaseParams {
  lease: string;
}

export interface Limits {
  frame_bytes: number;
  depth: number;
  requests_in_flight: number;
  queue: number;
  subscriber_events: number;
  subscriber_bytes: number;
}

export interface ListParams {
  updates?: boolean;
}

export interface LoadParams {
  model: string;
  system?: string;
  persona?: string;
  keep_alive?: number;
  adapter?: string;
  draft_model?: string;
}

export interface MalformedToolCall {
  text: string;
  reason: string;
  name?: string;
}

export interface Memory {
  budget_bytes: number;
  used_bytes: number;
  footprint_bytes?: number;
  reserve_bytes?: number;
  capacity_bytes?: number;
  available_bytes?: number;
  measured_at?: number;
  pressure?: Pressure;
  models?: MemoryHolder[];
}

export interface MemoryHolder {
  model: string;
  reserved_bytes: number;
  footprint_bytes?: number;
  share_bytes?: number;
}

export interface Message {
  role: "assistant" | "system" | "tool" | "user";
  content?: string | (TextPart | ImagePart | ImageUrlPart)[];
  name?: string;
  tool_calls?: Record<string, unknown>[];
  tool_call_id?: string;
}

export interface MetricsResult {
  content_type: string;
  text: string;
}

export interface Model {
  id: string;
  state: "Downloaded" | "Downloading" | "Loading" | "NotDownloaded" | "Ready";
  source: "builtin" | "hub" | "path";
  revision?: string;
  latest_revision?: string;
  size_bytes?: number;
  phase?: string;
  progress?: number;
  error?: ErrorObject;
  context_length?: number;
  memory_bytes?: number;
  footprint_bytes?: number;
  active?: number;
  waiting?: number;
  leases?: number;
  idle_unload_at?: number;
  draft_model?: string;
  kind?: "adapter" | "model";
  pinned?: boolean;
  preload?: boolean;
  adapter?: string;
  capabilities?: string[];
  prewarmed?: number;
}

export interface ModelCache {
  model: string;
  memory?: CacheInMemory;
  disk?: CacheOnDisk;
}

export interface ModelParams {
  model: string;
}

export interface ModelStats {
  model: string;
  requests?: Record<string, Record<string, number>>;
  slow_requests?: number;
  prompt_tokens?: number;
  cached_tokens?: number;
  completion_tokens?: number;
  now_tokens_per_s?: number;
  recent_tokens_per_s?: number;
  queue_s?: Distribution;
  load_s?: Distribution;
  first_token_s?: Distribution;
  total_s?: Distribution;
  tokens_per_s?: Distribution;
  load_failures?: Record<string, number>;
  unloads?: Record<string, number>;
  deaths?: Record<string, number>;
  prompt_cache?: PromptCacheTotals;
  speculation?: SpeculationTotals;
}

export interface ModelStory {
  model: string;
  steps: StoryStep[];
}

export interface ModelsResult {
  models: Model[];
}

export interface OptionalModelParams {
  model?: string;
}

export interface Persona {
  model?: string;
  max_tokens?: number;
  temperature?: number;
  top_p?: number;
  top_k?: number;
  min_p?: number;
  repetition_penalty?: number;
  presence_penalty?: number;
  frequency_penalty?: number;
  logit_bias?: Record<string, number>;
  seed?: number;
  stop?: string[];
  logprobs?: number;
  schema?: Record<string, unknown> | boolean;
  grammar?: string;
  thinking?: boolean;
  keep_alive?: number;
  timeout_s?: number;
  cache_prompt?: boolean;
  xtc_probability?: number;
  xtc_threshold?: number;
  thinking_budget?: number;
  n?: number;
  adapter?: string;
  speculation?: "auto" | "draft" | "lookup" | "off";
  context_policy?: "drop_oldest" | "refuse" | "rotate";
  kv_bits?: 4 | 8;
  deterministic?: boolean;
  system?: string;
  description?: string;
}

export interface PersonasResult {
  personas: Record<string, Persona>;
  templates: Record<string, Template>;
}

export interface Plan {
  model: string;
  download_bytes: number;
  disk_free_bytes: number;
  weights_bytes: number;
  kv_bytes: number;
  memory_bytes: number;
  memory_available_bytes: number;
  fits: boolean;
  revision?: string;
  evicts?: string[];
  load_s?: number;
  kind?: "adapter" | "model";
  disk_missing_bytes?: number;
}

export interface PlanParams {
  model: string;
  revision?: string;
  context_length?: number;
}

export interface Pressure {
  level?: "critical" | "normal" | "warning";
  source?: string;
  since_at?: number;
}

export interface ProcessItem {
  method: "process";
  params: ProcessParams;
  custom_id?: string;
}

export interface ProcessParams {
  model?: string;
  max_tokens?: number;
  temperature?: number;
  top_p?: number;
  top_k?: number;
  min_p?: number;
  repetition_penalty?: number;
  presence_penalty?: number;
  frequency_penalty?: number;
  logit_bias?: Record<string, number>;
  seed?: number;
  stop?: string[];
  logprobs?: number;
  schema?: Record<string, unknown> | boolean;
  grammar?: string;
  thinking?: boolean;
  keep_alive?: number;
  timeout_s?: number;
  cache_prompt?: boolean;
  xtc_probability?: number;
  xtc_threshold?: number;
  thinking_budget?: number;
  n?: number;
  adapter?: string;
  speculation?: "auto" | "draft" | "lookup" | "off";
  context_policy?: "drop_oldest" | "refuse" | "rotate";
  kv_bits?: 4 | 8;
  deterministic?: boolean;
  stream?: boolean;
  priority?: "batch" | "interactive";
  persona?: string;
  prompt: string;
  system?: string;
  template?: string;
  values?: Record<string, string>;
}

export interface PromptCacheTotals {
  hits?: number;
  misses?: number;
  saved_tokens?: number;
  disk_hits?: number;
  disk_tokens?: number;
  disk_failures?: number;
}

export interface RestartResult {
  version: string;
  pid?: number;
}

export interface ServerInfo {
  name: string;
  version: string;
  pid: number;
}

export interface SetConfigParams {
  values?: Record<string, unknown>;
  unset?: string[];
}

export interface SettingValue {
  value: unknown;
  origin: "default" | "environment" | "file" | "flag";
  applies: "connection" | "download" | "load" | "now" | "restart";
  place?: string;
  configured?: unknown;
}

export interface ShutdownParams {
  if_idle?: boolean;
}

export interface Since {
  epoch: string;
  rev: number;
}

export interface Snapshot {
  models?: Model[];
  jobs?: Job[];
  stopping?: boolean;
  memory_pressure?: "critical" | "normal" | "warning";
}

export interface Speculation {
  kind: "draft" | "lookup";
  drafted_tokens: number;
  accepted_tokens: number;
}

export interface SpeculationTotals {
  drafted_tokens?: number;
  accepted_tokens?: number;
}

export interface Stats {
  since_at: number;
  models: ModelStats[];
  clients: ClientTotals;
  events: EventTotals;
  downloads: DownloadTotals;
  log_lines_dropped?: number;
}

export interface StatsParams {
  model?: string;
}

export interface Status {
  version: string;
  pid: number;
  uptime_s: number;
  rss_bytes: number;
  models: StatusModels;
  queue: StatusQueue;
  clients: number;
  subscribers: number;
  memory: Memory;
  workers: WorkerHealth[];
  tasks?: number;
  draining?: boolean;
  activated?: boolean;
  config_error?: ErrorObject;
}

export interface StatusModels {
  known: number;
  loaded: number;
}

export interface StatusQueue {
  waiting: number;
  running: number;
}

export interface StoriesResult {
  stories: ModelStory[];
}

export interface StoryStep {
  at: number;
  cause: string;
  source: "Downloaded" | "Downloading" | "Loading" | "NotDownloaded" | "Ready";
  target: "Downloaded" | "Downloading" | "Loading" | "NotDownloaded" | "Ready";
}

export interface Stream {
  id: number | string;
  seq: number;
  index?: number;
  text?: string;
  reasoning?: string;
  tool_calls?: ToolCall[];
  malformed_tool_calls?: MalformedToolCall[];
  phase?: "downloading" | "loading" | "prompt" | "queued";
  progress?: number;
}

export interface SubscribeParams {
  topics?: string[];
  models?: string[];
  since?: Since;
}

export interface SubscribeResult {
  subscription: number;
  epoch: string;
  rev: number;
  snapshot?: Snapshot;
  resync?: boolean;
}

export interface SubscriptionParams {
  subscription: number;
}

export interface Template {
  prompt: string;
  placeholders?: string[];
  defaults?: Record<string, string>;
  description?: string;
}

export interface TextPart {
  type: "text";
  text: string;
}

export interface Timings {
  queue_s?: number;
  load_s?: number;
  prompt_s?: number;
  first_token_s?: number;
  decode_s?: number;
  total_s?: number;
}

export interface TokenLogprob {
  token: string;
  token_id: number;
  logprob: number;
  top?: [string, number][];
}

export interface TokensParams {
  model?: string;
  text?: string;
  messages?: Message[];
  tools?: Record<string, unknown>[];
}

export interface TokensResult {
  tokens: number;
}

export interface ToolCall {
  id: string;
  name: string;
  arguments: Record<string, unknown>;
}

export interface Usage {
  prompt_tokens: number;
  completion_tokens: number;
  cached_tokens?: number;
  reasoning_tokens?: number;
}

export interface VerifyResult {
  ok: boolean;
  bad_files?: BadFile[];
}

export interface WorkerHealth {
  model: string;
  deaths: number;
  last_death?: ErrorObject;
  breaker?: "closed" | "half_open" | "open";
  retry_at?: number;
}

/** Every method, with what it takes and answers. */
export interface Methods {
  "hello": { params: { protocol: [number, number]; client: ClientInfo }; result: HelloResult };
  "ping": { params: Record<string, never>; result: Empty };
  "status": { params: Record<string, never>; result: Status };
  "stats": { params: { model?: string }; result: Stats };
  "metrics": { params: Record<string, never>; result: MetricsResult };
  "shutdown": { params: { if_idle?: boolean }; result: Empty };
  "restart": { params: Record<string, never>; result: RestartResult };
  "rpc.discover": { params: Record<string, never>; result: Record<string, unknown> };
  "models.list": { params: { updates?: boolean }; result: ModelsResult };
  "models.get": { params: { model: string }; result: Model };
  "models.story": { params: { model?: string }; result: StoriesResult };
  "models.load": { params: { model: string; system?: string; persona?: string; keep_alive?: number; adapter?: string; draft_model?: string }; result: Model };
  "models.unload": { params: { model: string }; result: Model };
  "models.acquire": { params: { model: string }; result: Lease };
  "models.release": { params: { lease: string }; result: Empty };
  "models.plan": { params: { model: string; revision?: string; context_length?: number }; result: Plan };
  "models.download": { params: { model: string; revision?: string; repair?: boolean }; result: DownloadResult };
  "models.delete": { params: { model: string }; result: DeleteResult };
  "models.verify": { params: { model: string }; result: VerifyResult };
  "models.catalog": { params: Record<string, never>; result: CatalogResult };
  "config.get": { params: { names?: string[] }; result: ConfigResult };
  "config.set": { params: { values?: Record<string, unknown>; unset?: string[] }; result: ConfigChange };
  "config.reload": { params: Record<string, never>; result: ConfigChange };
  "cache.list": { params: Record<string, never>; result: CacheResult };
  "cache.clear": { params: { model?: string }; result: ClearCacheResult };
  "jobs.list": { params: Record<string, never>; result: JobsResult };
  "jobs.get": { params: { job: string }; result: Job };
  "jobs.wait": { params: { job: string }; result: Job };
  "jobs.cancel": { params: { job: string; discard?: boolean }; result: Job };
  "batch.submit": { params: { items?: (ProcessItem | ChatItem)[]; model?: string; key?: string; name?: string; open?: boolean }; result: Job };
  "batch.append": { params: { job: string; items: (ProcessItem | ChatItem)[]; at?: number }; result: Job };
  "batch.start": { params: { job: string }; result: Job };
  "batch.list": { params: Record<string, never>; result: JobsResult };
  "batch.get": { params: { job: string }; result: Job };
  "batch.results": { params: { job: string; after?: number; limit?: number }; result: BatchResultsResult };
  "batch.cancel": { params: { job: string }; result: Job };
  "batch.delete": { params: { job: string; cancel?: boolean }; result: Empty };
  "personas.list": { params: Record<string, never>; result: PersonasResult };
  "process": { params: { prompt: string; model?: string; max_tokens?: number; temperature?: number; top_p?: number; top_k?: number; min_p?: number; repetition_penalty?: number; presence_penalty?: number; frequency_penalty?: number; logit_bias?: Record<string, number>; seed?: number; stop?: string[]; logprobs?: number; schema?: Record<string, unknown> | boolean; grammar?: string; thinking?: boolean; keep_alive?: number; timeout_s?: number; cache_prompt?: boolean; xtc_probability?: number; xtc_threshold?: number; thinking_budget?: number; n?: number; adapter?: string; speculation?: "auto" | "draft" | "lookup" | "off"; context_policy?: "drop_oldest" | "refuse" | "rotate"; kv_bits?: 4 | 8; deterministic?: boolean; stream?: boolean; priority?: "batch" | "interactive"; persona?: string; system?: string; template?: string; values?: Record<string, string> }; result: Completion };
  "chat": { params: { messages: Message[]; model?: string; max_tokens?: number; temperature?: number; top_p?: number; top_k?: number; min_p?: number; repetition_penalty?: number; presence_penalty?: number; frequency_penalty?: number; logit_bias?: Record<string, number>; seed?: number; stop?: string[]; logprobs?: number; schema?: Record<string, unknown> | boolean; grammar?: string; thinking?: boolean; keep_alive?: number; timeout_s?: number; cache_prompt?: boolean; xtc_probability?: number; xtc_threshold?: number; thinking_budget?: number; n?: number; adapter?: string; speculation?: "auto" | "draft" | "lookup" | "off"; context_policy?: "drop_oldest" | "refuse" | "rotate"; kv_bits?: 4 | 8; deterministic?: boolean; stream?: boolean; priority?: "batch" | "interactive"; persona?: string; tools?: Record<string, unknown>[]; tool_choice?: string | Record<string, unknown> }; result: Completion };
  "tokens.count": { params: { model?: string; text?: string; messages?: Message[]; tools?: Record<string, unknown>[] }; result: TokensResult };
  "tokens.encode": { params: { text: string; model?: string; special?: boolean; pieces?: boolean }; result: EncodeResult };
  "tokens.decode": { params: { tokens: number[]; model?: string }; result: DecodeResult };
  "embed": { params: { input: string[]; model?: string; dimensions?: number; normalize?: boolean; truncate?: boolean; encoding?: "base64" | "float"; keep_alive?: number; timeout_s?: number }; result: EmbedResult };
  "cancel": { params: { id: number | string }; result: CancelResult };
  "events.subscribe": { params: { topics?: string[]; models?: string[]; since?: Since }; result: SubscribeResult };
  "events.unsubscribe": { params: { subscription: number }; result: Empty };
}

/** The stable names of failures. */
export type ErrorKind = "parse_error" | "invalid_request" | "method_not_found" | "invalid_params" | "internal_error" | "cancelled" | "model_not_found" | "model_invalid" | "model_busy" | "queue_full" | "insufficient_disk" | "insufficient_memory" | "worker_died" | "deadline_exceeded" | "unsupported" | "context_exceeded" | "load_failed" | "download_failed" | "verification_failed" | "shutting_down" | "not_found" | "permission_denied" | "model_not_downloaded" | "memory_pressure" | "daemon_busy" | "restart_failed" | "invalid_settings";
