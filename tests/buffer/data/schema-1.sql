BEGIN TRANSACTION;
CREATE TABLE counts (
	task_name VARCHAR NOT NULL, 
	status VARCHAR NOT NULL, 
	n INTEGER NOT NULL, 
	PRIMARY KEY (task_name, status)
);
INSERT INTO "counts" VALUES('math','pending',2);
INSERT INTO "counts" VALUES('math','running',1);
INSERT INTO "counts" VALUES('math','completed',1);
INSERT INTO "counts" VALUES('math','interrupted',0);
INSERT INTO "counts" VALUES('code','failed',1);
INSERT INTO "counts" VALUES('code','filtered',1);
INSERT INTO "counts" VALUES('code','completed',1);
INSERT INTO "counts" VALUES('math','consumed',1);
INSERT INTO "counts" VALUES('math','archived',1);
INSERT INTO "counts" VALUES('math','expired',2);
CREATE TABLE groups (
	group_id INTEGER NOT NULL, 
	task_name VARCHAR NOT NULL, 
	epoch INTEGER, 
	position INTEGER, 
	status VARCHAR NOT NULL, 
	ready_seq INTEGER NOT NULL, 
	consumed_seq INTEGER NOT NULL, 
	consumed_step INTEGER, 
	take INTEGER, 
	min_version INTEGER, 
	max_version INTEGER, 
	members INTEGER NOT NULL, 
	tokens INTEGER NOT NULL, 
	filter_reason TEXT, 
	created_at FLOAT NOT NULL, 
	updated_at FLOAT NOT NULL, 
	PRIMARY KEY (group_id), 
	CONSTRAINT one_group_per_prompt UNIQUE (task_name, epoch, position)
);
INSERT INTO "groups" VALUES(1,'math',0,0,'archived',9,1,1,1,0,2,2,9,NULL,1.79524372303814363474e+09,1.79524372306100869181e+09);
INSERT INTO "groups" VALUES(2,'math',0,1,'consumed',10,2,2,2,1,3,2,9,NULL,1.79524372303814363474e+09,1.79524372306200027463e+09);
INSERT INTO "groups" VALUES(3,'math',0,2,'expired',11,4611686018427387904,NULL,NULL,NULL,NULL,2,0,NULL,1.79524372303814363474e+09,1.7952437230663216114e+09);
INSERT INTO "groups" VALUES(4,'math',0,3,'completed',12,4611686018427387904,NULL,NULL,3,5,2,9,NULL,1.79524372303814363474e+09,1.79524372305069422725e+09);
INSERT INTO "groups" VALUES(5,'math',0,4,'expired',13,4611686018427387904,NULL,NULL,NULL,NULL,2,0,NULL,1.79524372303814363474e+09,1.7952437230663216114e+09);
INSERT INTO "groups" VALUES(6,'math',0,5,'running',6,4611686018427387904,NULL,NULL,NULL,NULL,2,0,NULL,1.79524372303814363474e+09,1.79524372304144263267e+09);
INSERT INTO "groups" VALUES(7,'math',0,6,'pending',7,4611686018427387904,NULL,NULL,NULL,NULL,2,0,NULL,1.79524372303814363474e+09,1.79524372303814363474e+09);
INSERT INTO "groups" VALUES(8,'math',0,7,'pending',8,4611686018427387904,NULL,NULL,NULL,NULL,2,0,NULL,1.79524372303814363474e+09,1.79524372303814363474e+09);
INSERT INTO "groups" VALUES(20,'code',NULL,NULL,'failed',14,4611686018427387904,NULL,NULL,0,0,2,6,NULL,1.79524372305328464502e+09,1.79524372305328464502e+09);
INSERT INTO "groups" VALUES(21,'code',NULL,NULL,'filtered',15,4611686018427387904,NULL,NULL,0,0,2,6,'all equal',1.79524372305466723438e+09,1.79524372305466723438e+09);
INSERT INTO "groups" VALUES(22,'code',NULL,NULL,'completed',16,4611686018427387904,NULL,NULL,3,3,2,6,NULL,1.79524372305574440953e+09,1.79524372305574440953e+09);
CREATE TABLE millrace_meta (
	"key" VARCHAR NOT NULL, 
	value VARCHAR NOT NULL, 
	PRIMARY KEY ("key")
);
INSERT INTO "millrace_meta" VALUES('schema_version','1');
INSERT INTO "millrace_meta" VALUES('opened_at','2026-11-21T06:48:43.029328+00:00');
INSERT INTO "millrace_meta" VALUES('committed_step','1');
INSERT INTO "millrace_meta" VALUES('committed_version','2 at step 1');
CREATE TABLE payloads (
	group_id INTEGER NOT NULL, 
	extras TEXT NOT NULL, 
	arrays BLOB NOT NULL, 
	PRIMARY KEY (group_id), 
	FOREIGN KEY(group_id) REFERENCES groups (group_id) ON DELETE CASCADE
);
INSERT INTO "payloads" VALUES(1,'[{"n":3,"prompt_n":null,"runs":1,"text":"Größe 𝛼 \"quoted\"","turns":[["assistant",0,3]],"reward_parts":{"p":0.25},"metrics":{"a":1.5}},{"n":6,"prompt_n":null,"runs":2,"text":"three","turns":[["assistant",0,5],["environment",5,6]],"reward_parts":{},"metrics":{}}]',X'000000000100000002000000000000BF000000BF000000BF0000000003000000000000000100000002000000070000000800000009000000000000BF000000BF000000BF000080BF000000C00000000000000000030000000200000003000000010101010101010100');
INSERT INTO "payloads" VALUES(2,'[{"n":3,"prompt_n":null,"runs":1,"text":"Größe 𝛼 \"quoted\"","turns":[["assistant",0,3]],"reward_parts":{"p":0.25},"metrics":{"a":1.5}},{"n":6,"prompt_n":null,"runs":2,"text":"three","turns":[["assistant",0,5],["environment",5,6]],"reward_parts":{},"metrics":{}}]',X'000000000100000002000000000000BF000000BF000000BF0100000003000000000000000100000002000000070000000800000009000000000000BF000000BF000000BF000080BF000000C00000000001000000030000000300000003000000010101010101010100');
INSERT INTO "payloads" VALUES(3,'[{"n":0,"prompt_n":null,"runs":0,"text":null,"turns":[],"reward_parts":{},"metrics":{}},{"n":0,"prompt_n":null,"runs":0,"text":null,"turns":[],"reward_parts":{},"metrics":{}}]',X'');
INSERT INTO "payloads" VALUES(4,'[{"n":3,"prompt_n":null,"runs":1,"text":"Größe 𝛼 \"quoted\"","turns":[["assistant",0,3]],"reward_parts":{"p":0.25},"metrics":{"a":1.5}},{"n":6,"prompt_n":null,"runs":2,"text":"three","turns":[["assistant",0,5],["environment",5,6]],"reward_parts":{},"metrics":{}}]',X'000000000100000002000000000000BF000000BF000000BF0300000003000000000000000100000002000000070000000800000009000000000000BF000000BF000000BF000080BF000000C00000000003000000030000000500000003000000010101010101010100');
INSERT INTO "payloads" VALUES(5,'[{"n":0,"prompt_n":null,"runs":0,"text":null,"turns":[],"reward_parts":{},"metrics":{}},{"n":0,"prompt_n":null,"runs":0,"text":null,"turns":[],"reward_parts":{},"metrics":{}}]',X'');
INSERT INTO "payloads" VALUES(20,'[{"n":3,"prompt_n":null,"runs":1,"text":"three","turns":[["assistant",0,3]],"reward_parts":{},"metrics":{}},{"n":3,"prompt_n":null,"runs":1,"text":"three","turns":[["assistant",0,3]],"reward_parts":{},"metrics":{}}]',X'000000000100000002000000000000BF000000BF000000BF0000000003000000000000000100000002000000000000BF000000BF000000BF0000000003000000010101010101');
INSERT INTO "payloads" VALUES(21,'[{"n":3,"prompt_n":null,"runs":1,"text":"three","turns":[["assistant",0,3]],"reward_parts":{},"metrics":{}},{"n":3,"prompt_n":null,"runs":1,"text":"three","turns":[["assistant",0,3]],"reward_parts":{},"metrics":{}}]',X'000000000100000002000000000000BF000000BF000000BF0000000003000000000000000100000002000000000000BF000000BF000000BF0000000003000000010101010101');
INSERT INTO "payloads" VALUES(22,'[{"n":3,"prompt_n":null,"runs":1,"text":"three","turns":[["assistant",0,3]],"reward_parts":{},"metrics":{}},{"n":3,"prompt_n":null,"runs":1,"text":"three","turns":[["assistant",0,3]],"reward_parts":{},"metrics":{}}]',X'000000000100000002000000000000BF000000BF000000BF0300000003000000000000000100000002000000000000BF000000BF000000BF0300000003000000010101010101');
CREATE TABLE prompts (
	group_id INTEGER NOT NULL, 
	data TEXT NOT NULL, 
	PRIMARY KEY (group_id), 
	FOREIGN KEY(group_id) REFERENCES groups (group_id) ON DELETE CASCADE
);
INSERT INTO "prompts" VALUES(1,'[{"row":{"prompt":"p0"},"prompt":"p0"}]');
INSERT INTO "prompts" VALUES(2,'[{"row":{"prompt":"p1"},"prompt":"p1"}]');
INSERT INTO "prompts" VALUES(3,'[{"row":{"prompt":"p2"},"prompt":"p2"}]');
INSERT INTO "prompts" VALUES(4,'[{"row":{"prompt":"p3"},"prompt":"p3"}]');
INSERT INTO "prompts" VALUES(5,'[{"row":{"prompt":"p4"},"prompt":"p4"}]');
INSERT INTO "prompts" VALUES(6,'[{"row":{"prompt":"p5"},"prompt":"p5"}]');
INSERT INTO "prompts" VALUES(7,'[{"row":{"prompt":"p6"},"prompt":"p6"}]');
INSERT INTO "prompts" VALUES(8,'[{"row":{"prompt":"p7"},"prompt":"p7"}]');
INSERT INTO "prompts" VALUES(20,'[{"row":{"prompt":"p20"},"prompt":"p20"}]');
INSERT INTO "prompts" VALUES(21,'[{"row":{"prompt":"p21"},"prompt":"p21"}]');
INSERT INTO "prompts" VALUES(22,'[{"row":{"prompt":"p22"},"prompt":"p22"}]');
CREATE TABLE rollouts (
	group_id INTEGER NOT NULL, 
	member INTEGER NOT NULL, 
	status VARCHAR NOT NULL, 
	attempts INTEGER NOT NULL, 
	interruptions INTEGER NOT NULL, 
	tokens INTEGER NOT NULL, 
	min_version INTEGER, 
	finish_reason VARCHAR, 
	score FLOAT, 
	reward FLOAT, 
	error TEXT, 
	PRIMARY KEY (group_id, member), 
	FOREIGN KEY(group_id) REFERENCES groups (group_id) ON DELETE CASCADE
)
 WITHOUT ROWID

;
INSERT INTO "rollouts" VALUES(1,0,'completed',0,0,3,0,'stop',1.0,1.0,NULL);
INSERT INTO "rollouts" VALUES(1,1,'completed',0,0,6,0,'stop',1.0,1.0,NULL);
INSERT INTO "rollouts" VALUES(2,0,'completed',0,0,3,1,'stop',1.0,1.0,NULL);
INSERT INTO "rollouts" VALUES(2,1,'completed',0,0,6,1,'stop',1.0,1.0,NULL);
INSERT INTO "rollouts" VALUES(3,0,'expired',0,0,0,NULL,NULL,NULL,NULL,NULL);
INSERT INTO "rollouts" VALUES(3,1,'expired',0,0,0,NULL,NULL,NULL,NULL,NULL);
INSERT INTO "rollouts" VALUES(4,0,'completed',0,0,3,3,'stop',1.0,1.0,NULL);
INSERT INTO "rollouts" VALUES(4,1,'completed',0,0,6,3,'stop',1.0,1.0,NULL);
INSERT INTO "rollouts" VALUES(5,0,'expired',0,0,0,NULL,NULL,NULL,NULL,NULL);
INSERT INTO "rollouts" VALUES(5,1,'expired',0,0,0,NULL,NULL,NULL,NULL,NULL);
INSERT INTO "rollouts" VALUES(6,0,'pending',0,0,0,NULL,NULL,NULL,NULL,NULL);
INSERT INTO "rollouts" VALUES(6,1,'pending',0,0,0,NULL,NULL,NULL,NULL,NULL);
INSERT INTO "rollouts" VALUES(7,0,'pending',0,0,0,NULL,NULL,NULL,NULL,NULL);
INSERT INTO "rollouts" VALUES(7,1,'pending',0,0,0,NULL,NULL,NULL,NULL,NULL);
INSERT INTO "rollouts" VALUES(8,0,'pending',0,0,0,NULL,NULL,NULL,NULL,NULL);
INSERT INTO "rollouts" VALUES(8,1,'pending',0,0,0,NULL,NULL,NULL,NULL,NULL);
INSERT INTO "rollouts" VALUES(20,0,'failed',0,0,3,0,'stop',1.0,1.0,NULL);
INSERT INTO "rollouts" VALUES(20,1,'failed',0,0,3,0,'stop',1.0,1.0,NULL);
INSERT INTO "rollouts" VALUES(21,0,'filtered',0,0,3,0,'stop',1.0,1.0,NULL);
INSERT INTO "rollouts" VALUES(21,1,'filtered',0,0,3,0,'stop',1.0,1.0,NULL);
INSERT INTO "rollouts" VALUES(22,0,'completed',0,0,3,3,'stop',1.0,1.0,NULL);
INSERT INTO "rollouts" VALUES(22,1,'completed',0,0,3,3,'stop',1.0,1.0,NULL);
CREATE TABLE sequences (
	name VARCHAR NOT NULL, 
	last INTEGER NOT NULL, 
	PRIMARY KEY (name)
);
INSERT INTO "sequences" VALUES('group',22);
INSERT INTO "sequences" VALUES('ready',16);
INSERT INTO "sequences" VALUES('take',2);
INSERT INTO "sequences" VALUES('consumed',2);
CREATE TABLE steps (
	step INTEGER NOT NULL, 
	version INTEGER, 
	PRIMARY KEY (step)
);
INSERT INTO "steps" VALUES(1,1);
INSERT INTO "steps" VALUES(2,2);
CREATE TABLE tasks (
	task_name VARCHAR NOT NULL, 
	drawn INTEGER NOT NULL, 
	moves INTEGER NOT NULL, 
	cursor TEXT, 
	PRIMARY KEY (task_name)
);
INSERT INTO "tasks" VALUES('math',8,1,'{"offset":8}');
INSERT INTO "tasks" VALUES('code',3,0,NULL);
CREATE INDEX groups_fifo ON groups (task_name, status, consumed_seq, ready_seq);
CREATE INDEX groups_consumed ON groups (status, consumed_step, task_name) WHERE consumed_step IS NOT NULL;
CREATE INDEX groups_versions ON groups (task_name, min_version) WHERE status IN ('completed', 'interrupted');
CREATE INDEX groups_stalest ON groups (task_name, consumed_seq, min_version, ready_seq) WHERE status = 'completed';
CREATE INDEX groups_freshest ON groups (task_name, consumed_seq, min_version DESC, ready_seq) WHERE status = 'completed';
COMMIT;
