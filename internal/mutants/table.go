package main

// mutants are the defences, each removed. The text must stand exactly once in
// the package, so that the list stays true when the code changes.
var mutants = []mutant{
	// --- whose socket it is ---
	{
		name:  "identity-at-loan",
		old:   `l.stolen = p.known && !p.sys.stillIs(fd, p.who)`,
		new:   `l.stolen = false`,
		tests: `TestAStolenConnectionIsNeverLentNorTouched`,
	},
	{
		name:  "identity-at-close",
		old:   "if c.word.Load()&stolen == 0 && !c.probe.isStolen() {\n\t\tc.word.Or(shut)\n\t\treturn true",
		new:   "if c.word.Load()&stolen == 0 {\n\t\tc.word.Or(shut)\n\t\treturn true",
		tests: `TestAStolenConnectionIsNeverLentNorTouched`,
	},
	{
		name:  "identity-after-setup",
		old:   `if w.fresh && c.word.Load()&(hungUp|stolen) == 0 && !c.probe.isStolen() {`,
		new:   `if w.fresh {`,
		tests: `TestAStolenConnectionIsNeverLentNorTouched`,
	},
	{
		name:  "identity-in-the-sweep",
		old:   `if err != nil || taken {`,
		new:   `if err != nil || taken && false {`,
		tests: `TestAStolenConnectionIsNeverLentNorTouched`,
	},
	{
		name:  "stolen-outlives-begin",
		old:   `gen<<genShift|w&(hungUp|stolen|broken)|lent|flags`,
		new:   `gen<<genShift|w&(hungUp|broken)|lent|flags`,
		tests: `TestDisownedBetweenTheLookAndTheLoanIsStillStolen`,
	},
	{
		name:  "hung-up-outlives-begin",
		old:   `gen<<genShift|w&(hungUp|stolen|broken)|lent|flags`,
		new:   `gen<<genShift|w&(stolen|broken)|lent|flags`,
		tests: `TestAHangUpBetweenTheLookAndTheLoanIsNotForgotten`,
	},
	{
		name:  "quarantine-forgets",
		old:   "quarantine.add(c.nc)\n",
		new:   "\n",
		tests: `TestAStolenConnectionIsNeverLentNorTouched`,
	},
	{
		name:  "quarantine-closes",
		old:   "quarantine.add(c.nc)\n",
		new:   "c.nc.Close()\n",
		tests: `TestAStolenConnectionIsNeverLentNorTouched`,
	},
	{
		name:  "number-proves-death",
		old:   `old != nil && old.word.Load()&shut == 0`,
		new:   `old != nil && false`,
		tests: `TestThePoolsOwnNextDialProvesTheOlderEntryDead`,
	},
	{
		name:  "mark-dead-by-number",
		old:   `case c.probe.fd == fd:`,
		new:   `case c.probe.fd == fd && false:`,
		tests: `TestMarkDead`,
	},
	{
		name:  "mark-dead-by-identity",
		old:   `case known && c.probe.known && c.probe.who == who:`,
		new:   `case known && c.probe.known && c.probe.who == who && false:`,
		tests: `TestMarkDead`,
	},

	// --- whether it lives and is clean ---
	{
		name:  "peek-at-loan",
		old:   `l := newLook(p, !cfg.NoProbe)`,
		new:   `l := newLook(p, false)`,
		tests: `TestAByteThatNobodyAskedForCostsTheConnection`,
	},
	{
		name:  "peek-in-the-sweep",
		old:   `return seen == peeked{}`,
		new:   `return seen == peeked{} || true`,
		tests: `TestASweepClosesWhatDiedAndKeepsWhatLives/tcp$`,
	},
	{
		name:  "death-noticed-at-once",
		old:   "p.mu.Unlock()\n\tp.examine(at, false)",
		new:   "p.mu.Unlock()\n\t_ = at",
		tests: `TestServersThatHangUpEmptyTheIdleListUnasked`,
	},
	{
		name:  "hung-up-while-lent",
		old:   `c.word.Or(hungUp)`,
		new:   ``,
		tests: `TestAHangUpDuringALoanClosesTheConnectionOnItsReturn`,
	},
	{
		name:  "leftovers-in-tls",
		old:   `return word&moved != 0 && c.probe.leftovers()`,
		new:   `return false`,
		tests: `TestUnreadBytesCostTheConnection`,
	},
	{
		name:  "leftovers-in-the-state",
		old:   `b.Buffered() > 0`,
		new:   `b.Buffered() < 0`,
		tests: `TestWhatTheStateHasBufferedCountsAsUnread`,
	},
	{
		name:  "part-of-a-record",
		old:   `return r.have > 0`,
		new:   `return false`,
		tests: `TestUnreadBytesCostTheConnection|TestAPartOfARecordIsKnownFromAWholeOne`,
	},
	{
		name:  "record-framing",
		old:   "if int(r.have) == len(r.header) && r.body == 0 {\n\t\t\tr.have = 0",
		new:   "if int(r.have) == len(r.header) {\n\t\t\tr.have = 0",
		tests: `TestAPartOfARecordIsKnownFromAWholeOne`,
	},
	{
		name:  "record-sum",
		old:   `!r.odd && r.have == 0 && r.held == r.read.Load()`,
		new:   `!r.odd && r.have == 0`,
		tests: `TestUnfitConnectionIsNeverLentAgain`,
	},
	{
		name:  "flood-budget",
		old:   `s.budget -= n`,
		new:   `s.budget -= 0 * n`,
		tests: `TestFloodOfDataIsBounded|TestFloodOfTicketsIsBounded`,
	},
	{
		name:  "bytes-before-the-handshake",
		old:   `if early.bytes {`,
		new:   `if early.bytes && false {`,
		tests: `TestBytesBeforeTheHandshakeFailTheDial`,
	},
	{
		name:  "look-behind-the-ping",
		old:   `return c.ask() // the answer may have been longer than Check read`,
		new:   `return ClosedUnknown, nil`,
		tests: `TestBytesThatCheckLeavesReachNobody`,
	},
	{
		name:  "age-at-loan",
		old:   `if reason := p.aged(c, c.idleFor, c.since); reason != ClosedUnknown {`,
		new:   `if reason := p.aged(c, c.idleFor, c.since); false {`,
		tests: `TestAnExpiredConnectionIsNotLentThoughNoSweepSawIt`,
	},
	{
		name:  "age-in-the-sweep",
		old:   `now.sub(c.since), now); reason != ClosedUnknown {`,
		new:   `now.sub(c.since), now); reason != ClosedUnknown && false {`,
		tests: `TestAnIdleConnectionIsClosedAfterTwoMinutes`,
	},
	{
		name:  "wall-clock",
		old:   `max(0, t.Sub(k.then), t.Round(0).Sub(k.then.Round(0)))`,
		new:   `max(0, t.Sub(k.then))`,
		tests: `TestAJumpOfTheWallClockAloneAgesConnections`,
	},
	{
		name:  "jitter",
		old:   `c.life = m - rand.N(m/10+1)`,
		new:   `c.life = m - 0*rand.N(m/10+1)`,
		tests: `TestLifetimeJitterIsDrawnOncePerConnection|TestIdleConnectionsExpireOneByOne`,
	},

	// --- what a loan must not leave to the next ---
	{
		name:  "ctx-done-discards",
		old:   `case word&cut != 0 || ctx.Err() != nil:`,
		new:   `case false:`,
		tests: `TestDoneContextCostsTheConnectionWhateverFnSays`,
	},
	{
		name:  "error-discards",
		old:   `case err != nil && !forgiven:`,
		new:   `case false:`,
		tests: `TestVerdictOfEachEnd`,
	},
	{
		name:  "in-flight-discards",
		old:   "case word&inFlight != 0:\n\t\treason = ClosedInFlight",
		new:   "case false:\n\t\treason = ClosedInFlight",
		tests: `TestVerdictOfEachEnd`,
	},
	{
		name:  "panic-discards",
		old:   `p.discard(c, reason, nil)`,
		new:   `_, _ = reason, p.park(c, used)`,
		tests: `TestEveryWayOfLeavingFnGivesTheConnectionBack|TestVerdictOfEachEnd|TestPanicWhileBuilding`,
	},
	{
		name:  "broken-discards",
		old:   "case word&broken != 0:\n\t\treason, why = ClosedBroken",
		new:   "case false:\n\t\treason, why = ClosedBroken",
		tests: `TestASocketThatFailedIsNotKeptThoughFnIsContent`,
	},
	{
		name:  "failed-write-poisons",
		old:   "if err != nil {\n\t\tc.word.Or(broken)\n\t}\n\treturn c.leave(n, err)",
		new:   "return c.leave(n, err)",
		tests: `TestAWriteTimeOutUnderTLSCostsTheConnection`,
	},
	{
		name:  "half-closed-discards",
		old:   `case word&halfClosed != 0:`,
		new:   `case false:`,
		tests: `TestHalfClosedConnectionsAreNotKept`,
	},
	{
		name:  "time-out-discards",
		old:   `case word&timedOut != 0 && !forgiven:`,
		new:   `case false:`,
		tests: `TestATimeOutInMidReplyCostsTheConnection|TestOnlyKeepForgivesATimeOut`,
	},
	{
		name:  "handle-ends-with-its-loan",
		old:   `gen != 0 && w>>genShift != gen`,
		new:   `false`,
		tests: `TestAHandleCarriedOutOfFnIsDeadAndHarmless`,
	},
	{
		name:  "close-ends-with-its-loan",
		old:   `h.gen != 0 && w>>genShift != h.gen`,
		new:   `false`,
		tests: `TestAHandleCarriedOutOfFnIsDeadAndHarmless`,
	},
	{
		name:  "deadlines-cleared",
		old:   "c.nc.SetDeadline(time.Time{})\n\t\t\tc.deadlineSet = false",
		new:   "c.deadlineSet = false",
		tests: `TestNoDeadlineIsFeltByTheNextBorrower|TestALeftOverDeadlineIsGoneWithItsLoan`,
	},
	{
		name:  "ctx-interrupts",
		old:   "c.deadlineSet = true\n\tc.nc.SetDeadline(past)",
		new:   "c.deadlineSet = true",
		tests: `TestCtxBoundsAllReadsOfALoanTogether/in_a_bubble`,
	},
	{
		name:  "reset-failure-closes",
		old:   `reason, own = ClosedResetFailed, true`,
		new:   `own = true`,
		tests: `TestResetThatFailsInAnyWayClosesTheConnectionAndHoldsNobodyUp`,
	},
	{
		name:  "setup-failure-is-seen",
		old:   `a.state, err = p.cfg.Setup(`,
		new:   `a.state, _ = p.cfg.Setup(`,
		tests: `TestSetupThatFailsInAnyWayIsTheBorrowersAndLeavesNothing`,
	},
	{
		name:  "setup-failure-closes",
		old:   `p.discard(a.c, ClosedSetupFailed, err)`,
		new:   `p.removed(a.c, ClosedSetupFailed, err)`,
		tests: `TestSetupThatFailsInAnyWayIsTheBorrowersAndLeavesNothing`,
	},

	// --- who gets what ---
	{
		name:  "addresses-of-one-hash",
		old:   `if s == nil || s.addr != *a {`,
		new:   `if s == nil {`,
		tests: `TestAddressesOfOneHashAreKeptApart`,
	},
	{
		name:  "surplus-dials",
		old:   "p.doubtDialsLocked(s)\n",
		new:   "\n",
		tests: `TestABurstThatReturnsServeLeavesOneNewConnection`,
	},
	{
		name:  "given-up-is-no-failure",
		old:   "if a.givenUp(failure) {\n\t\treturn\n\t}",
		new:   ``,
		tests: `TestABurstThatReturnsServeLeavesOneNewConnection`,
	},
	{
		name:  "clock-comes-to-rest",
		old:   `if !k.asked.Swap(false) {`,
		new:   `if false {`,
		tests: `TestTheCoarseClockLagsByATickAtMost`,
	},
	{
		name:  "clock-exact-if-felt",
		old:   `cfg.IdleTimeout > 0 && cfg.IdleTimeout < 100*tick ||`,
		new:   `false &&`,
		tests: `TestTheClockIsExactWhereALagCouldBeFelt`,
	},
	{
		name:  "sweep-meets-all",
		old:   `if c.site != nil && c.round != r.round {`,
		new:   `if c.site != nil && c.round != r.round && c.phase != borrowed {`,
		tests: `TestAWalkMeetsEachConnectionThatStays`,
	},
	{
		name:  "idle-lifo",
		old:   `for inOrder && below != nil && below.since > c.since {`,
		new:   `for below != nil {`,
		tests: `TestTheLastGivenBackIsLentFirst`,
	},
	{
		name:  "waiters-fifo",
		old:   `for after != nil && after.seq > w.seq {`,
		new:   `for after != nil {`,
		tests: `TestWaitersAreServedInTheOrderTheyCame`,
	},
	{
		name:  "starvation-guard",
		old:   `p.overtook > limit`,
		new:   `p.overtook < 0`,
		tests: `TestABusyAddressCannotStarveAnOlderWaiter`,
	},
	{
		name:  "late-delivery-goes-back",
		old:   "p.mu.Unlock()\n\tp.park(w.c, untouched)",
		new:   `p.mu.Unlock()`,
		tests: `TestACancelledWaiterIsNeverHandedAConnection`,
	},
	{
		name:  "delivery-to-a-done-ctx",
		old:   `if ctx.Err() != nil && w.err == nil {`,
		new:   `if false {`,
		tests: `TestACancelledWaiterIsNeverHandedAConnection`,
	},
	{
		name:  "freed-slot-serves",
		old:   "p.admitLocked(&todo)\n\tp.forgetLocked(s)\n\tp.leftLocked()\n\tp.mu.Unlock()\n\ttodo.run(p)\n\tif reason == ClosedUnknown {",
		new:   "p.forgetLocked(s)\n\tp.leftLocked()\n\tp.mu.Unlock()\n\ttodo.run(p)\n\tif reason == ClosedUnknown {",
		tests: `TestDiscardWakesTheOldestWaiter`,
	},
	{
		name:  "failed-dial-serves",
		old:   "p.admitLocked(&todo)\n\tp.forgetLocked(s)\n\tp.leftLocked()\n\tat := ",
		new:   "p.forgetLocked(s)\n\tp.leftLocked()\n\tat := ",
		tests: `TestAFailedDialLetsTheNextWaiterTry`,
	},

	// --- which address ---
	{
		name:  "canonical-key",
		old:   `if addr, err = p.resolve(addr); err != nil {`,
		new:   `if _, err = p.resolve(addr); err != nil {`,
		tests: `TestEqualAddressesMeetOnOneConnection|TestHostsAreFolded`,
	},
	{
		name:  "scope-in-the-key",
		old:   `c, err := a, a.Transport.validate()`,
		new:   "c, err := a, a.Transport.validate()\n\tc.Scope = \"\"",
		tests: `TestEveryFieldOfTheAddressIsPartOfTheIdentity`,
	},
	{
		name:  "qos-in-the-key",
		old:   `c, err := a, a.Transport.validate()`,
		new:   "c, err := a, a.Transport.validate()\n\tc.QoS = QoS{}",
		tests: `TestEveryFieldOfTheAddressIsPartOfTheIdentity`,
	},
	{
		name:  "server-name-in-the-key",
		old:   "default:\n\t\t\tif c.ServerName, err = canonicalHost(\"ServerName\", a.ServerName); err != nil {",
		new:   "default:\n\t\t\tif c.ServerName, err = \"\", nil; err != nil {",
		tests: `TestEveryFieldOfTheAddressIsPartOfTheIdentity`,
	},
	{
		name:  "session-cache-per-address",
		old:   "s.lru.Get(addr)\n\tif known",
		new:   "s.lru.Get(Addr{})\n\taddr = Addr{}\n\tif known",
		tests: `TestSessionsAreResumedPerAddressOnly`,
	},
	{
		name:  "server-name-verified",
		old:   `if cfg.ServerName = addr.ServerName; cfg.ServerName == "" {`,
		new:   `if cfg.ServerName = addr.ServerName; cfg.ServerName == "" || true {`,
		tests: `TestTheNameOfTheServerIsVerified`,
	},

	// --- limits ---
	{
		name:  "max-open",
		old:   `if openOf(&p.n) >= p.limitLocked() {`,
		new:   `if false {`,
		tests: `TestAFullPoolMakesRoomByItself`,
	},
	{
		name:  "max-per-addr",
		old:   `want = int32(min(int(want), p.cfg.MaxPerAddr-openOf(&s.n)))`,
		new:   `_ = want`,
		tests: `TestFewConnectionsServeMany`,
	},
	{
		name:  "max-dialing",
		old:   `room := p.cfg.MaxDialing - int(p.n[dialing])`,
		new:   `room := p.cfg.MaxDialing`,
		tests: `TestMaxDialingBoundsTheDialsToAllAddressesTogether`,
	},
	{
		name:  "max-uses",
		old:   `case c.uses >= p.cfg.MaxUses:`,
		new:   `case false:`,
		tests: `TestMaxUsesCountsLoans`,
	},
	{
		name:  "slot-free-when-closed",
		old:   "go func() {\n\t\tdefer func() { // also after a runtime.Goexit",
		new:   "free()\n\tgo func() {\n\t\tdefer func() { // also after a runtime.Goexit",
		tests: `TestACloseThatHangsIsGivenUpAfterFiveSeconds`,
	},
	{
		name:  "lru-victim",
		old:   "if u == used {\n\t\tp.recency.touch(c)",
		new:   "if false {\n\t\tp.recency.touch(c)",
		tests: `TestEvictLRUClosesTheLeastRecentlyUsed`,
	},
	{
		name:  "in-use-is-no-victim",
		old:   "case c.phase == idle:\n\t\t\treturn c",
		new:   "case c.phase == idle, c.phase == borrowed:\n\t\t\treturn c",
		tests: `TestEvictionLooksAtAllAddressesAndSparesWhatIsInUse`,
	},
	{
		name:  "retire-epoch",
		old:   `case c.epoch != s.epoch:`,
		new:   `case false:`,
		tests: `TestRetireAndCloseIdle|TestADialUnderWayAtRetireIsNotLent`,
	},
	{
		name:  "closed-pool-keeps-nothing",
		old:   "case p.closed:\n\t\treturn ClosedWithPool",
		new:   "case false:\n\t\treturn ClosedWithPool",
		tests: `TestCloseEndsEverythingButALoan|TestADialThatEndsAfterCloseIsClosed`,
	},
	{
		name:  "back-off",
		old:   `return s.trouble != nil && s.trouble.failures >= backoffAfter`,
		new:   `return false`,
		tests: `TestAfterThreeFailuresOneProbesAndTheOthersFailAtOnce`,
	},

	// --- handles ---
	{
		name:  "exhaustion-evicts",
		old:   `if err == nil || !p.outOfHandles(err) {`,
		new:   `if true {`,
		tests: `TestOutOfHandlesTheLeastRecentlyUsedMakeRoomInExactOrder`,
	},
	{
		name:  "exhaustion-behind-dns",
		old:   `errors.As(err, &dns) && p.sys.noHandleFree()`,
		new:   `errors.As(err, &dns) && false`,
		tests: `TestExhaustionHiddenBehindTheLookupOfANameEvicts`,
	},
	{
		name:  "unknown-name-evicts-nothing",
		old:   `errors.As(err, &dns) && p.sys.noHandleFree()`,
		new:   `errors.As(err, &dns)`,
		tests: `TestATrulyUnknownNameEvictsNothing|TestAnUnknownNameEvictsNothing`,
	},
	{
		name:  "none-removable-asked-once",
		old:   `if asked || p.cfg.NoneRemovable == nil {`,
		new:   `if asked && false || p.cfg.NoneRemovable == nil {`,
		tests: `TestNoneRemovableIsAskedOnceAndItsYesIsOneMoreTry`,
	},
	{
		name:  "low-handles-keep-nothing",
		old:   `if p.pressure >= handlesLow {`,
		new:   `if false {`,
		tests: `TestLowHandlesStopKeepingAndCriticalOnesCostOneIdleForEachNew`,
	},
	{
		name:  "critical-handles-evict",
		old:   `if p.pressure == handlesCritical {`,
		new:   `if false {`,
		tests: `TestLowHandlesStopKeepingAndCriticalOnesCostOneIdleForEachNew`,
	},
}
