package gateway

import (
	"encoding/binary"
	"encoding/hex"
	"io"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/tasks"
)

// readRegisters is a request for count holding registers.
func readRegisters(tid uint16, unit byte, from, count uint16) []byte {
	b := []byte{0, 0, 0, 0, 0, 6, unit, 3, 0, 0, 0, 0}
	binary.BigEndian.PutUint16(b, tid)
	binary.BigEndian.PutUint16(b[8:], from)
	binary.BigEndian.PutUint16(b[10:], count)
	return b
}

// device answers a request for registers with their numbers, as a unit that has
// one transaction at a time does.
func device(spoil func(reply []byte) []byte) func(*faultnet.Peer) {
	return func(p *faultnet.Peer) {
		head := make([]byte, 12)
		for {
			if _, err := io.ReadFull(p, head); err != nil {
				return
			}
			from, count := binary.BigEndian.Uint16(head[8:]), int(binary.BigEndian.Uint16(head[10:]))
			reply := append([]byte{}, head[:8]...)
			reply = append(reply, byte(2*count))
			for i := range count {
				reply = binary.BigEndian.AppendUint16(reply, from+uint16(i))
			}
			binary.BigEndian.PutUint16(reply[4:], uint16(len(reply)-6))
			if spoil != nil {
				if reply = spoil(reply); reply == nil {
					return
				}
			}
			p.Write(reply)
		}
	}
}

func (c *caller) hearFrame() []byte {
	c.t.Helper()
	head := make([]byte, 6)
	_, err := io.ReadFull(c.r, head)
	require.NoError(c.t, err)
	rest := make([]byte, binary.BigEndian.Uint16(head[4:]))
	_, err = io.ReadFull(c.r, rest)
	require.NoError(c.t, err)
	return append(head, rest...)
}

// PLT-10: twenty masters, all with the same transaction ids, on one connection.
func TestModbusMastersShareADeviceAndEachGetsItsOwnRegisters(t *testing.T) {
	ids := make(map[uint16]bool)
	srv, to := serve(t, faultnet.Options{Handler: device(func(reply []byte) []byte {
		ids[binary.BigEndian.Uint16(reply)] = true // one connection, so one goroutine
		return reply
	})})
	g := begin(t, Config{Framing: "modbus", To: to, MaxOpen: 1})
	var wg tasks.Group
	for m := range 20 {
		c := g.call()
		wg.Go(func() {
			for i := range uint16(20) {
				request := readRegisters(i, 9, uint16(m)*1000+i, 2)
				c.Write(request)
				want := append([]byte{byte(i >> 8), byte(i), 0, 0, 0, 7, 9, 3, 4}, 0, 0, 0, 0)
				binary.BigEndian.PutUint16(want[9:], uint16(m)*1000+i)
				binary.BigEndian.PutUint16(want[11:], uint16(m)*1000+i+1)
				require.Equal(t, want, c.hearFrame())
			}
		})
	}
	wg.Wait()
	require.Equal(t, 1, srv.Accepts())
	require.Len(t, ids, 400, "no id was used twice on the connection")
}

func TestModbusFailuresAreExceptionsWithTheClientsTransactionID(t *testing.T) {
	t.Parallel()
	exception := func(code byte) []byte { return []byte{0x12, 0x34, 0, 0, 0, 3, 7, 0x83, code} }
	for name, c := range map[string]struct {
		spoil func([]byte) []byte
		code  byte
		why   string
	}{
		"the device hangs up":      {func([]byte) []byte { return nil }, 0x0B, "lost"},
		"another transaction":      {func(b []byte) []byte { b[1] ^= 1; return b }, 0x0B, "out-of-step"},
		"another unit":             {func(b []byte) []byte { b[6]++; return b }, 0x0B, "out-of-step"},
		"another function":         {func(b []byte) []byte { b[7] = 4; return b }, 0x0B, "out-of-step"},
		"another protocol":         {func(b []byte) []byte { b[3] = 1; return b }, 0x0B, "out-of-step"},
		"a length that is too big": {func(b []byte) []byte { b[4] = 0xff; return b }, 0x0B, "too-long"},
		"half a reply":             {func(b []byte) []byte { return b[:8] }, 0x0B, "late"},
	} {
		t.Run(name, func(t *testing.T) {
			srv, to := serve(t, faultnet.Options{Handler: device(c.spoil)})
			g := begin(t, Config{Framing: "modbus", To: to, RequestTimeout: time.Second})
			cl := g.call()
			for i := range 2 {
				cl.Write(readRegisters(0x1234, 7, 0, 1))
				require.Equal(t, exception(c.code), cl.hearFrame())
				require.Equal(t, i+1, srv.Accepts(), "the connection was not used again")
			}
			require.Equal(t, uint64(2), g.Status().Failures[c.why])
		})
	}

	// An exception of the device is an ordinary reply.
	_, to := serve(t, faultnet.Options{Handler: device(func(b []byte) []byte {
		return append(b[:4:4], 0, 3, b[6], b[7]|0x80, 2)
	})})
	cl := begin(t, Config{Framing: "modbus", To: to}).call()
	cl.Write(readRegisters(0x1234, 7, 0, 1))
	require.Equal(t, exception(2), cl.hearFrame())

	down, to := serve(t, faultnet.Options{})
	down.Stop()
	cl = begin(t, Config{Framing: "modbus", To: to}).call()
	cl.Write(readRegisters(0x1234, 7, 0, 1))
	require.Equal(t, exception(0x0A), cl.hearFrame(), "gateway path unavailable")

	_, to = serve(t, faultnet.Options{Handler: device(nil)})
	g := begin(t, Config{Framing: "modbus", To: to, MaxOpen: 1, RequestTimeout: 50 * time.Millisecond})
	held, free := make(chan bool), make(chan bool)
	go g.pool.With(t.Context(), g.to, func(connpool.Conn) error { held <- true; <-free; return nil })
	<-held
	cl = g.call()
	cl.Write(readRegisters(0x1234, 7, 0, 1))
	require.Equal(t, exception(0x06), cl.hearFrame(), "server device busy")
	free <- true
}

func TestWhatIsNoModbusCostsItsSender(t *testing.T) {
	for _, bad := range []string{"474554202f20", "000100010006", "000100000001", "0001000000ff"} {
		srv, to := serve(t, faultnet.Options{Handler: device(nil)})
		g := begin(t, Config{Framing: "modbus", To: to})
		c := g.call()
		b, _ := hex.DecodeString(bad)
		c.Write(b)
		c.hearEnd()
		require.Zero(t, srv.Accepts())
	}
}
