package main

// gatewayMutants are the defences of the gateway, each removed.
var gatewayMutants = []mutant{
	// --- whose reply it is ---
	{
		name:  "modbus-own-ids",
		old:   `binary.BigEndian.PutUint16(request, u.tid)`,
		new:   `u.tid = client`,
		tests: `TestModbusMastersShareADevice`,
	},
	{
		name:  "modbus-reply-is-compared",
		old:   `tid != u.tid || reply[6] != request[6]`,
		new:   `false && tid != u.tid || reply[6] != request[6]`,
		tests: `TestModbusFailuresAreExceptions`,
	},
	{
		name:  "leftovers-are-told",
		old:   `func (u *replies) Buffered() int { return u.w - u.r }`,
		new:   `func (u *replies) Buffered() int { return 0 }`,
		tests: `TestWhatTheServerSaysUnaskedReachesNobody`,
	},
	{
		name:  "no-room-stays-in-step",
		old:   `case errors.Is(err, errNoMemory): // and in step all the same`,
		new:   `case false:`,
		tests: `TestMemoryIsBounded`,
	},

	// --- who the client is ---
	{
		name:  "database-in-scope",
		old:   `s := "db" + strconv.Itoa(id.db)`,
		new:   `s := "db"`,
		tests: `TestDatabasesAndUsersDoNotShareConnections`,
	},
	{
		name:  "password-in-scope",
		old:   `id.user, id.pass, id.name} {`,
		new:   `id.user, id.name} {`,
		tests: `TestEveryPartOfAnIdentityIsPartOfItsScope`,
	},
	{
		name:  "parts-are-told-apart",
		old:   "\t\t\tmac.Write(size[:])\n",
		new:   "\n",
		tests: `TestEveryPartOfAnIdentityIsPartOfItsScope`,
	},
	{
		name:  "tag-has-a-key",
		old:   `hmac.New(sha256.New, scopeKey[:])`,
		new:   `hmac.New(sha256.New, nil)`,
		tests: `TestScopesDoNotTellCredentials`,
	},
	{
		name:  "resp3-in-scope",
		old:   `s += ",resp3"`,
		new:   `s += ""`,
		tests: `TestRESP3IsAnIdentityToo|TestEveryPartOfAnIdentity`,
	},
	{
		name:  "claims-are-tried-apart",
		old:   `if scope == "" || g.known.has(scope) {`,
		new:   `if true {`,
		tests: `TestWrongPasswordsLeaveNothingBehind`,
	},
	{
		name:  "tried-connections-are-closed",
		old:   "\t\tran = true\n\t\tdefer c.Close()\n\t\tu := connpool.State[*replies](c)\n\t\tif err := cl.resp.id.assume",
		new:   "\t\tran = true\n\t\tu := connpool.State[*replies](c)\n\t\tif err := cl.resp.id.assume",
		tests: `TestClaimsAreTriedOnConnectionsThatServeNobodyElse`,
	},
	{
		name:  "strange-numbers-are-not-passed-on",
		old:   `if err != nil || db < 0 || strconv.Itoa(db) != string(args[0]) {`,
		new:   `if err != nil || db < 0 {`,
		tests: `TestDatabasesAndUsersDoNotShareConnections`,
	},

	// --- what is left behind ---
	{
		name:  "multi-pins",
		old:   `"MULTI": {transacts, vMulti}`,
		new:   `"MULTI": {plain, vMulti}`,
		tests: `TestATransactionHasAConnectionOfItsOwn`,
	},
	{
		name:  "watch-pins",
		old:   `"WATCH": {transacts, vWatch}`,
		new:   `"WATCH": {plain, vWatch}`,
		tests: `TestATransactionHasAConnectionOfItsOwn`,
	},
	{
		name:  "released-when-quiet",
		old:   `!p.kept && !p.multi && !p.watching && p.total == 0 && p.shards == 0`,
		new:   `!p.kept && !p.watching && p.total == 0 && p.shards == 0`,
		tests: `TestATransactionHasAConnectionOfItsOwn|TestDesyncNoRedis`,
	},
	{
		name:  "released-when-unsubscribed",
		old:   `!p.watching && p.total == 0 && p.shards == 0`,
		new:   `!p.watching && p.shards == 0`,
		tests: `TestSubscribersHaveAConnection`,
	},
	{
		name:  "identity-in-a-transaction-keeps",
		old:   `case m.class == keeps || m.class == identifies || m.class == local,`,
		new:   `case m.class == keeps || m.class == local,`,
		tests: `TestATransactionThatSelectsADatabase`,
	},
	{
		name:  "blocked-client-that-leaves",
		old:   `for len(p.pending) > 0 && p.blocking == 0 && !p.over {`,
		new:   `for len(p.pending) > 0 && !p.over {`,
		tests: `TestABlockedCommandHoldsAConnection`,
	},
	{
		name:  "blocking-has-its-time",
		old:   `case len(p.pending) == 0 || p.blocking > 0:`,
		new:   `case len(p.pending) == 0:`,
		tests: `TestABlockedCommandHoldsAConnection`,
	},
	{
		name:  "tracking-pins",
		old:   "\t\tif m, known = clientTable[string(upper(buf[:0], sub))]; !known {\n\t\t\tm.class = keeps\n\t\t}",
		new:   "\t\tm = clientTable[string(upper(buf[:0], sub))]",
		tests: `TestWhatCannotBeTakenBack`,
	},
	{
		name:  "command-after-the-release",
		old:   `p.cl.in.untake(frame) // it is for another connection`,
		new:   ``,
		tests: `TestACommandThatMeetsTheReleaseIsNotLost`,
	},

	// --- what is read ---
	{
		name:  "inline-is-rewritten",
		old:   `return cl.resp.line, classify(cl.resp.line), nil`,
		new:   `return frame, meaning{}, nil`,
		tests: `TestInlineCommandsAreUnderstood`,
	},
	{
		name:  "one-spelling-of-numbers",
		old:   `r.digits > 0 && r.n == 0, r.digits >= 10`,
		new:   `r.digits >= 10`,
		tests: `TestBrokenRESP`,
	},
	{
		name:  "bulk-strings-end",
		old:   "\t\t\tif b[i] != \"\\n\\r\"[s.body-1] {\n\t\t\t\treturn i, false, &malformed{\"a bulk string is longer than its length says\"}\n\t\t\t}\n\t\t\ti++\n\t\t\tif s.body--; s.body == 0 {\n\t\t\t\ts.state = reqDollar",
		new:   "\t\t\ti++\n\t\t\tif s.body--; s.body == 0 {\n\t\t\t\ts.state = reqDollar",
		tests: `TestBrokenRESP`,
	},
	{
		name:  "frames-are-bounded",
		old:   `if f.scanned-f.start > f.max {`,
		new:   `if false {`,
		tests: `TestFramesThatAreTooLong`,
	},
	{
		name:  "replies-are-bounded",
		old:   `if size += n; size > u.max {`,
		new:   `if size += n; false {`,
		tests: `TestFramesThatAreTooLong`,
	},
	{
		name:  "memory-is-bounded",
		old:   `if b.held.Add(int64(n)) > b.limit {`,
		new:   `if b.held.Add(int64(n)) > b.limit && false {`,
		tests: `TestMemoryIsBounded`,
	},
	{
		name:  "half-requests-are-closed",
		old:   `limit = cl.g.RequestTimeout`,
		new:   `limit = 0`,
		tests: `TestAHalfRequestIsClosed`,
	},
	{
		name:  "early-reply",
		old:   "\treturn <-sent\n",
		new:   "\treturn nil\n",
		tests: `TestAnEarlyReply|TestALargeRequest`,
	},
	{
		name:  "large-requests-are-sent-aside",
		old:   `if len(wire) <= batchBytes {`,
		new:   `if true {`,
		tests: `TestALargeRequest`,
	},

	// --- who gets in ---
	{
		name:  "loopback-only",
		old:   `case e.tls || e.isLocal():`,
		new:   `case true:`,
		tests: `TestItIsNeverOpenToANetworkByMistake`,
	},
	{
		name:  "both-flags",
		old:   `case cfg.InsecureListen && cfg.AnyoneCanConnect:`,
		new:   `case cfg.InsecureListen || cfg.AnyoneCanConnect:`,
		tests: `TestItIsNeverOpenToANetworkByMistake`,
	},
	{
		name:  "status-is-local",
		old:   `} else if p.status.tls || !p.status.isLocal() {`,
		new:   `} else if false {`,
		tests: `TestItIsNeverOpenToANetworkByMistake`,
	},
	{
		name:  "status-knows-its-host",
		old:   `if (err != nil || !ip.Unmap().IsLoopback()) && !strings.EqualFold(host, "localhost") {`,
		new:   `if false && ip.IsLoopback() && err == nil {`,
		tests: `TestStatusIsServed`,
	},
	{
		name:  "client-certificates",
		old:   `forClients.ClientAuth = tls.RequireAndVerifyClientCert`,
		new:   `forClients.ClientAuth = tls.RequestClientCert`,
		tests: `TestClientsNeedACertificate`,
	},
	{
		name:  "reload-retires",
		old:   `g.pool.Retire(addr)` + "\n\t\t}\n\t\tg.Logger",
		new:   `_ = addr` + "\n\t\t}\n\t\tg.Logger",
		tests: `TestReloadReplaces`,
	},
	{
		name:  "bad-files-change-nothing",
		old:   "\tchanged = c.seen == nil",
		new:   "\tc.forClients.Store(nil)\n\tchanged = c.seen == nil",
		tests: `TestReloadedCertificates`,
	},
	{
		name:  "live-sockets-are-left-alone",
		old:   `if !errors.Is(err, syscall.ECONNREFUSED) {`,
		new:   `if errors.Is(err, syscall.EACCES) {`,
		tests: `TestAStaleSocketIsReplaced`,
	},
	{
		name:  "starts-take-turns",
		old:   "\tdefer unlock()\n\tif err := removeStale",
		new:   "\tunlock()\n\tif err := removeStale",
		tests: `TestOneOfManyGateways`,
	},
	{
		name:  "only-so-many-clients",
		old:   `full := len(g.clients) >= g.MaxClientsNow()`,
		new:   `full := false`,
		tests: `TestOneClientTooMany`,
	},
	{
		name:  "only-so-many-pins",
		old:   `pins:    make(chan struct{}, p.MaxPinned),`,
		new:   `pins:    make(chan struct{}, 1000),`,
		tests: `TestWhatCannotBeTakenBack`,
	},

	// --- how it ends ---
	{
		name:  "drain-asks-after-the-deadline",
		old:   "\tif cl.g.draining.Load() {\n\t\treturn errDraining\n\t}\n\treturn nil",
		new:   "\treturn nil",
		tests: `TestDrainLetsRequestsEnd`,
	},
	{
		name:  "drain-wakes-who-waits",
		old:   `cl.raw.SetReadDeadline(past)` + "\n\t}\n\tn :=",
		new:   `_ = cl` + "\n\t}\n\tn :=",
		tests: `TestDrainLetsRequestsEnd`,
	},
	{
		name:  "drain-spares-transactions",
		old:   `g.draining.Load() && len(p.pending) == 0 && !p.multi && !p.watching`,
		new:   `g.draining.Load() && len(p.pending) == 0`,
		tests: `TestDrainLetsATransactionEnd`,
	},
	{
		name:  "forgotten-transactions-end",
		old:   `held := p.active.Add(g.HoldTimeout); waiting &&`,
		new:   `held := p.active.Add(g.HoldTimeout); false && waiting &&`,
		tests: `TestATransactionThatIsForgotten`,
	},
	{
		name:  "ends-of-directions-are-passed-on",
		old:   `err = closeWrite(c)`,
		new:   `err = nil`,
		tests: `TestASessionPassesTheEnd`,
	},

	// --- what it never waits for ---
	{
		name:  "log-is-not-waited-for",
		old:   `if len(j.waiting) >= journalLength {`,
		new:   `if j.next.Handle(context.Background(), r); len(j.waiting) >= journalLength {`,
		tests: `TestNobodyWaitsForALog`,
	},
	{
		name:  "log-is-bounded",
		old:   `if len(j.waiting) >= journalLength {`,
		new:   `if false {`,
		tests: `TestLinesThatTheLogDoesNotTake`,
	},
	{
		name:  "lost-lines-are-counted",
		old:   `if !written(one.to, one.r) {`,
		new:   `if written(one.to, one.r); false {`,
		tests: `TestLinesThatTheLogDoesNotTake`,
	},
	{
		name:  "reload-heeds-the-end",
		old:   "\t\tcase <-ctx.Done():\n\t\t\tstuck = ctx.Err()\n",
		new:   "",
		tests: `TestAFileThatDoesNotOpen`,
	},
	{
		name:  "lock-is-not-waited-for",
		old:   `syscall.LOCK_EX|syscall.LOCK_NB`,
		new:   `syscall.LOCK_EX`,
		tests: `TestALockOnTheDirectory`,
	},
	{
		name:  "status-has-few-visitors",
		old:   `if len(c.all) >= c.most {`,
		new:   `if false {`,
		tests: `TestSilentVisitors|TestAVisitorWithARequest`,
	},

	// --- sockets and descriptors ---
	{
		name:  "mode-before-listening",
		old:   "\terr = os.Chmod(path, mode)\n\tbound(path)\n\tif err == nil {\n\t\terr = os.NewSyscallError(\"listen\", syscall.Listen(fd, 4096))",
		new:   "\terr = os.NewSyscallError(\"listen\", syscall.Listen(fd, 4096))\n\tbound(path)\n\tif err == nil {\n\t\terr = os.Chmod(path, mode)",
		tests: `TestASocketHasItsMode`,
	},
	{
		name:  "whose-file-it-is",
		old:   `err == nil && os.SameFile(now, s.file) {`,
		new:   `err == nil && now != nil {`,
		tests: `TestOnlyItsOwnSocketFile`,
	},
	{
		name:  "status-is-given-up-too",
		old:   `for _, s := range []*socket{g.listener, g.statusListener} {`,
		new:   `for _, s := range []*socket{g.listener} {`,
		tests: `TestASuccessorStarts`,
	},
	{
		name:  "spare-descriptor",
		old:   `if outOfDescriptors(err) && g.turnAway(&kept) {`,
		new:   `if false {`,
		tests: `TestAClientForWhomThereIsNoDescriptor`,
	},
	{
		name:  "clients-get-the-rest",
		old:   `return d.limit - d.server - d.status - d.reserve`,
		new:   `return d.limit - d.status - d.reserve`,
		tests: `TestClientsGetTheDescriptors`,
	},
	{
		name:  "not-its-own-server",
		old:   `if reaches(ctx, p.to, at) {`,
		new:   `if false {`,
		tests: `TestItIsNotItsOwnServer|TestAFoundPort`,
	},
	{
		name:  "wildcards-are-this-machine",
		old:   `if ours.IsUnspecified() && anyIsOurs(theirs) {`,
		new:   `if false {`,
		tests: `TestItIsNotItsOwnServer`,
	},

	// --- what is told ---
	{
		name:  "once-a-minute",
		old:   `if !s.last.IsZero() && now.Sub(s.last) < noticeEvery {`,
		new:   `if false {`,
		tests: `TestACauseIsTold`,
	},
	{
		name:  "reach-listens",
		old:   `said, err := listen(c, lookFor)`,
		new:   `said, err := listen(c, 0)`,
		tests: `TestReachSaysYes`,
	},
	{
		name:  "reach-knows-tls",
		old:   `case g.to.Transport != connpool.TLS && g.answersTLS(ctx, c):`,
		new:   `case false:`,
		tests: `TestReachSaysYes`,
	},
	{
		name:  "reach-asks-redis",
		old:   `return g.pings(c)`,
		new:   `return nil`,
		tests: `TestReachSaysYes`,
	},
	{
		name:  "alpn-for-clients",
		old:   `forClients = &tls.Config{MinVersion: tls.VersionTLS12, NextProtos: c.alpn}`,
		new:   `forClients = &tls.Config{MinVersion: tls.VersionTLS12}`,
		tests: `TestBothSidesOfTLS`,
	},
	{
		name:  "alpn-for-the-server",
		old:   `forServer = &tls.Config{MinVersion: tls.VersionTLS12, NextProtos: c.alpn}`,
		new:   `forServer = &tls.Config{MinVersion: tls.VersionTLS12}`,
		tests: `TestBothSidesOfTLS`,
	},
	{
		name:  "ticket-keys-rotate",
		old:   "\tforServer = &tls.Config{",
		new:   "\tif forClients != nil {\n\t\tforClients.SetSessionTicketKeys([][32]byte{{1}})\n\t}\n\tforServer = &tls.Config{",
		tests: `TestKeysOfSessionTickets`,
	},
}
