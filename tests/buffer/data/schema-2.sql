BEGIN TRANSACTION;
CREATE TABLE counts (
	task_name VARCHAR NOT NULL, 
	status VARCHAR NOT NULL, 
	n INTEGER NOT NULL, 
	PRIMARY KEY (task_name, status)
);
INSERT INTO "counts" VALUES('math','pending',2);
INSERT INTO "counts" VALUES('math','running',2);
INSERT INTO "counts" VALUES('math','completed',0);
INSERT INTO "counts" VALUES('math','interrupted',1);
INSERT INTO "counts" VALUES('code','failed',1);
INSERT INTO "counts" VALUES('code','filtered',1);
INSERT INTO "counts" VALUES('math','consumed',1);
INSERT INTO "counts" VALUES('math','archived',2);
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
	owner VARCHAR, 
	crashes INTEGER DEFAULT '0' NOT NULL, 
	min_version INTEGER, 
	max_version INTEGER, 
	oldest_version INTEGER DEFAULT '4611686018427387904' NOT NULL, 
	freshest_version INTEGER DEFAULT '4611686018427387904' NOT NULL, 
	members INTEGER NOT NULL, 
	tokens INTEGER NOT NULL, 
	payload_bytes INTEGER DEFAULT '0' NOT NULL, 
	pruned_at FLOAT, 
	filter_reason TEXT, 
	created_at FLOAT NOT NULL, 
	updated_at FLOAT NOT NULL, 
	PRIMARY KEY (group_id), 
	CONSTRAINT one_group_per_prompt UNIQUE (task_name, epoch, position)
);
INSERT INTO "groups" VALUES(1,'math',0,0,'archived',9,1,1,1,NULL,0,1,1,1,1,2,6,193,NULL,NULL,1.79525504349665307999e+09,1.79525504359568738939e+09);
INSERT INTO "groups" VALUES(2,'math',0,1,'archived',10,2,1,1,NULL,0,1,1,1,1,2,6,193,NULL,NULL,1.79525504349665307999e+09,1.79525504359568738939e+09);
INSERT INTO "groups" VALUES(3,'math',0,2,'consumed',11,3,2,2,'machine/4000000/0',0,1,1,1,1,2,6,193,NULL,NULL,1.79525504349665307999e+09,1.79525504359790396688e+09);
INSERT INTO "groups" VALUES(4,'math',0,3,'interrupted',12,4611686018427387904,NULL,NULL,NULL,0,1,1,1,1,2,7,186,NULL,NULL,1.79525504349665307999e+09,1.79525504355598735806e+09);
INSERT INTO "groups" VALUES(5,'math',0,4,'running',5,4611686018427387904,NULL,NULL,'machine/4000000/0',0,1,1,1,1,2,7,35,NULL,NULL,1.79525504349665307999e+09,1.79525504355992150304e+09);
INSERT INTO "groups" VALUES(6,'math',0,5,'running',6,4611686018427387904,NULL,NULL,'machine/4000000/0',0,NULL,NULL,4611686018427387904,4611686018427387904,2,0,35,NULL,NULL,1.79525504349665307999e+09,1.79525504351194167135e+09);
INSERT INTO "groups" VALUES(7,'math',0,6,'pending',7,4611686018427387904,NULL,NULL,NULL,0,NULL,NULL,4611686018427387904,4611686018427387904,2,0,35,NULL,NULL,1.79525504349665307999e+09,1.79525504349665307999e+09);
INSERT INTO "groups" VALUES(8,'math',0,7,'pending',8,4611686018427387904,NULL,NULL,NULL,0,NULL,NULL,4611686018427387904,4611686018427387904,2,0,35,NULL,NULL,1.79525504349665307999e+09,1.79525504349665307999e+09);
INSERT INTO "groups" VALUES(100,'code',NULL,NULL,'failed',13,4611686018427387904,NULL,NULL,NULL,0,0,0,0,0,2,6,193,NULL,NULL,1.79525504356815528866e+09,1.79525504356815528866e+09);
INSERT INTO "groups" VALUES(101,'code',NULL,NULL,'filtered',14,4611686018427387904,NULL,NULL,NULL,0,0,0,0,0,2,8,211,NULL,'no reason given',1.79525504357579731946e+09,1.79525504357579731946e+09);
CREATE TABLE millrace_meta (
	"key" VARCHAR NOT NULL, 
	value VARCHAR NOT NULL, 
	PRIMARY KEY ("key")
);
INSERT INTO "millrace_meta" VALUES('schema_version','2');
INSERT INTO "millrace_meta" VALUES('opened_at','2026-11-21T09:57:23.467983+00:00');
INSERT INTO "millrace_meta" VALUES('committed_step','1');
INSERT INTO "millrace_meta" VALUES('committed_version','2 at step 1');
CREATE TABLE payloads (
	group_id INTEGER NOT NULL, 
	extras TEXT NOT NULL, 
	arrays BLOB NOT NULL, 
	PRIMARY KEY (group_id), 
	FOREIGN KEY(group_id) REFERENCES groups (group_id) ON DELETE CASCADE
);
INSERT INTO "payloads" VALUES(1,'[{"n":3,"runs":1,"text_n":5,"turns":[["assistant",0,3]]},{"n":3,"runs":1,"text_n":5,"turns":[["assistant",0,3]]}]',X'000000000100000002000000000000000100000002000000000000BF000000BF000000BF000000BF000000BF000000BF0100000003000000010000000300000001010101010174687265657468726565');
INSERT INTO "payloads" VALUES(2,'[{"n":3,"runs":1,"text_n":5,"turns":[["assistant",0,3]]},{"n":3,"runs":1,"text_n":5,"turns":[["assistant",0,3]]}]',X'000000000100000002000000000000000100000002000000000000BF000000BF000000BF000000BF000000BF000000BF0100000003000000010000000300000001010101010174687265657468726565');
INSERT INTO "payloads" VALUES(3,'[{"n":3,"runs":1,"text_n":5,"turns":[["assistant",0,3]]},{"n":3,"runs":1,"text_n":5,"turns":[["assistant",0,3]]}]',X'000000000100000002000000000000000100000002000000000000BF000000BF000000BF000000BF000000BF000000BF0100000003000000010000000300000001010101010174687265657468726565');
INSERT INTO "payloads" VALUES(4,'[{"n":5,"runs":1,"text_n":5,"turns":[["assistant",0,5]]},{"n":2,"runs":1,"turns":[["assistant",0,2]]}]',X'00000000010000000200000003000000040000000100000002000000000000BF000000BF000000BF000000BF000000BF000000BF000000BF01000000050000000100000002000000010101010101017468726565');
INSERT INTO "payloads" VALUES(100,'[{"n":3,"runs":1,"text_n":5,"turns":[["assistant",0,3]]},{"n":3,"runs":1,"text_n":5,"turns":[["assistant",0,3]]}]',X'000000000100000002000000000000000100000002000000000000BF000000BF000000BF000000BF000000BF000000BF0000000003000000000000000300000001010101010174687265657468726565');
INSERT INTO "payloads" VALUES(101,'[{"n":4,"runs":1,"text_n":5,"turns":[["assistant",0,4]]},{"n":4,"runs":1,"text_n":5,"turns":[["assistant",0,4]]}]',X'0000000001000000020000000300000000000000010000000200000003000000000000BF000000BF000000BF000000BF000000BF000000BF000000BF000000BF00000000040000000000000004000000010101010101010174687265657468726565');
CREATE TABLE prefixes (
	group_id INTEGER NOT NULL, 
	number INTEGER NOT NULL, 
	extras TEXT NOT NULL, 
	arrays BLOB NOT NULL, 
	PRIMARY KEY (group_id, number), 
	FOREIGN KEY(group_id) REFERENCES groups (group_id) ON DELETE CASCADE
);
INSERT INTO "prefixes" VALUES(5,1,'[{"member":0,"start":0,"n":7,"runs":1,"turns":[["assistant",0,7]]}]',X'00000000010000000200000003000000040000000500000006000000000000BF000000BF000000BF000000BF000000BF000000BF000000BF010000000700000001010101010101');
CREATE TABLE producers (
	owner VARCHAR NOT NULL, 
	host VARCHAR NOT NULL, 
	pid INTEGER NOT NULL, 
	started_at FLOAT NOT NULL, 
	expires_at FLOAT NOT NULL, 
	transactions INTEGER NOT NULL, 
	PRIMARY KEY (owner)
);
INSERT INTO "producers" VALUES('machine/4000000/0','machine',4000000,1.79525504345812940594e+09,1.79525510345812940602e+09,0);
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
INSERT INTO "prompts" VALUES(100,'[{"row":{"prompt":"p100"},"prompt":"p100"}]');
INSERT INTO "prompts" VALUES(101,'[{"row":{"prompt":"p101"},"prompt":"p101"}]');
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
INSERT INTO "rollouts" VALUES(1,0,'completed',0,0,3,1,'stop',1.0,1.0,NULL);
INSERT INTO "rollouts" VALUES(1,1,'completed',0,0,3,1,'stop',1.0,1.0,NULL);
INSERT INTO "rollouts" VALUES(2,0,'completed',0,0,3,1,'stop',1.0,1.0,NULL);
INSERT INTO "rollouts" VALUES(2,1,'completed',0,0,3,1,'stop',1.0,1.0,NULL);
INSERT INTO "rollouts" VALUES(3,0,'completed',0,0,3,1,'stop',1.0,1.0,NULL);
INSERT INTO "rollouts" VALUES(3,1,'completed',0,0,3,1,'stop',1.0,1.0,NULL);
INSERT INTO "rollouts" VALUES(4,0,'completed',0,0,5,1,'stop',1.0,1.0,NULL);
INSERT INTO "rollouts" VALUES(4,1,'interrupted',0,0,2,1,NULL,NULL,NULL,NULL);
INSERT INTO "rollouts" VALUES(5,0,'running',0,0,7,1,NULL,NULL,NULL,NULL);
INSERT INTO "rollouts" VALUES(5,1,'pending',0,0,0,NULL,NULL,NULL,NULL,NULL);
INSERT INTO "rollouts" VALUES(6,0,'pending',0,0,0,NULL,NULL,NULL,NULL,NULL);
INSERT INTO "rollouts" VALUES(6,1,'pending',0,0,0,NULL,NULL,NULL,NULL,NULL);
INSERT INTO "rollouts" VALUES(7,0,'pending',0,0,0,NULL,NULL,NULL,NULL,NULL);
INSERT INTO "rollouts" VALUES(7,1,'pending',0,0,0,NULL,NULL,NULL,NULL,NULL);
INSERT INTO "rollouts" VALUES(8,0,'pending',0,0,0,NULL,NULL,NULL,NULL,NULL);
INSERT INTO "rollouts" VALUES(8,1,'pending',0,0,0,NULL,NULL,NULL,NULL,NULL);
INSERT INTO "rollouts" VALUES(100,0,'failed',0,0,3,0,'stop',1.0,1.0,NULL);
INSERT INTO "rollouts" VALUES(100,1,'failed',0,0,3,0,'stop',1.0,1.0,NULL);
INSERT INTO "rollouts" VALUES(101,0,'filtered',0,0,4,0,'stop',1.0,1.0,NULL);
INSERT INTO "rollouts" VALUES(101,1,'filtered',0,0,4,0,'stop',1.0,1.0,NULL);
CREATE TABLE sequences (
	name VARCHAR NOT NULL, 
	last INTEGER NOT NULL, 
	PRIMARY KEY (name)
);
INSERT INTO "sequences" VALUES('group',101);
INSERT INTO "sequences" VALUES('ready',14);
INSERT INTO "sequences" VALUES('take',2);
INSERT INTO "sequences" VALUES('consumed',3);
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
	pruned INTEGER DEFAULT '0' NOT NULL, 
	moves INTEGER NOT NULL, 
	cursor TEXT, 
	PRIMARY KEY (task_name)
);
INSERT INTO "tasks" VALUES('math',8,0,1,'{"offset":8}');
INSERT INTO "tasks" VALUES('code',2,0,0,NULL);
CREATE TABLE timelines (
	timeline INTEGER NOT NULL, 
	fork INTEGER NOT NULL, 
	step INTEGER NOT NULL, 
	at FLOAT NOT NULL, 
	PRIMARY KEY (timeline)
);
CREATE TABLE transitions (
	transition_id INTEGER NOT NULL, 
	group_id INTEGER NOT NULL, 
	at FLOAT NOT NULL, 
	source VARCHAR, 
	target VARCHAR NOT NULL, 
	owner VARCHAR NOT NULL, 
	step INTEGER, 
	version INTEGER, 
	reason TEXT, 
	PRIMARY KEY (transition_id), 
	FOREIGN KEY(group_id) REFERENCES groups (group_id) ON DELETE CASCADE
);
INSERT INTO "transitions" VALUES(1,1,1.79525504349665307999e+09,NULL,'pending','machine/4000000/0',NULL,NULL,NULL);
INSERT INTO "transitions" VALUES(2,2,1.79525504349665307999e+09,NULL,'pending','machine/4000000/0',NULL,NULL,NULL);
INSERT INTO "transitions" VALUES(3,3,1.79525504349665307999e+09,NULL,'pending','machine/4000000/0',NULL,NULL,NULL);
INSERT INTO "transitions" VALUES(4,4,1.79525504349665307999e+09,NULL,'pending','machine/4000000/0',NULL,NULL,NULL);
INSERT INTO "transitions" VALUES(5,5,1.79525504349665307999e+09,NULL,'pending','machine/4000000/0',NULL,NULL,NULL);
INSERT INTO "transitions" VALUES(6,6,1.79525504349665307999e+09,NULL,'pending','machine/4000000/0',NULL,NULL,NULL);
INSERT INTO "transitions" VALUES(7,7,1.79525504349665307999e+09,NULL,'pending','machine/4000000/0',NULL,NULL,NULL);
INSERT INTO "transitions" VALUES(8,8,1.79525504349665307999e+09,NULL,'pending','machine/4000000/0',NULL,NULL,NULL);
INSERT INTO "transitions" VALUES(9,1,1.79525504351194167135e+09,'pending','running','machine/4000000/0',NULL,NULL,NULL);
INSERT INTO "transitions" VALUES(10,2,1.79525504351194167135e+09,'pending','running','machine/4000000/0',NULL,NULL,NULL);
INSERT INTO "transitions" VALUES(11,3,1.79525504351194167135e+09,'pending','running','machine/4000000/0',NULL,NULL,NULL);
INSERT INTO "transitions" VALUES(12,4,1.79525504351194167135e+09,'pending','running','machine/4000000/0',NULL,NULL,NULL);
INSERT INTO "transitions" VALUES(13,5,1.79525504351194167135e+09,'pending','running','machine/4000000/0',NULL,NULL,NULL);
INSERT INTO "transitions" VALUES(14,6,1.79525504351194167135e+09,'pending','running','machine/4000000/0',NULL,NULL,NULL);
INSERT INTO "transitions" VALUES(15,1,1.79525504352750062946e+09,'running','completed','machine/4000000/0',NULL,1,NULL);
INSERT INTO "transitions" VALUES(16,2,1.79525504354087185859e+09,'running','completed','machine/4000000/0',NULL,1,NULL);
INSERT INTO "transitions" VALUES(17,3,1.79525504355395865447e+09,'running','completed','machine/4000000/0',NULL,1,NULL);
INSERT INTO "transitions" VALUES(18,4,1.79525504355598735806e+09,'running','interrupted','machine/4000000/0',NULL,1,NULL);
INSERT INTO "transitions" VALUES(19,100,1.79525504356815528866e+09,NULL,'failed','machine/4000000/0',NULL,0,NULL);
INSERT INTO "transitions" VALUES(20,101,1.79525504357579731946e+09,NULL,'filtered','machine/4000000/0',NULL,0,'no reason given');
INSERT INTO "transitions" VALUES(21,1,1.79525504357770371438e+09,'completed','consumed','machine/4000000/0',1,1,NULL);
INSERT INTO "transitions" VALUES(22,2,1.79525504357770371438e+09,'completed','consumed','machine/4000000/0',1,1,NULL);
INSERT INTO "transitions" VALUES(23,1,1.79525504359568738939e+09,'consumed','archived','machine/4000000/0',NULL,1,NULL);
INSERT INTO "transitions" VALUES(24,2,1.79525504359568738939e+09,'consumed','archived','machine/4000000/0',NULL,1,NULL);
INSERT INTO "transitions" VALUES(25,3,1.79525504359790396688e+09,'completed','consumed','machine/4000000/0',2,1,NULL);
CREATE INDEX groups_oldest ON groups (task_name, oldest_version, group_id, freshest_version) WHERE status IN ('completed', 'interrupted');
CREATE INDEX groups_stalest ON groups (task_name, consumed_seq, oldest_version, ready_seq) WHERE status = 'completed';
CREATE INDEX groups_prunable ON groups (consumed_step, consumed_seq, payload_bytes) WHERE status = 'archived' AND pruned_at IS NULL;
CREATE INDEX groups_consumed ON groups (status, consumed_step, task_name) WHERE consumed_step IS NOT NULL;
CREATE INDEX groups_running ON groups (group_id) WHERE status = 'running';
CREATE INDEX groups_fifo ON groups (task_name, status, consumed_seq, ready_seq);
CREATE INDEX groups_freshest ON groups (task_name, consumed_seq, oldest_version DESC, ready_seq) WHERE status = 'completed';
CREATE INDEX transitions_of_group ON transitions (group_id);
COMMIT;
